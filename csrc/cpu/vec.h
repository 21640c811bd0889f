// One vector type per instruction set, so that a kernel is written once: F32, I32, U64 and Mask
// hold kLanes lanes each (16 with AVX-512, 8 with AVX2, 4 in the generic version, which compilers
// turn into SSE2 or NEON). Every function here is inlined into the namespace of its instruction
// set.
//
// max, min and comparisons follow x86: where a lane of either side is NaN, max(a, b) and min(a, b)
// are b, and a comparison is false.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

#if defined(PYGPT_ISA_avx512) || defined(PYGPT_ISA_avx512_bf16)
#define PYGPT_AVX512 1
#elif defined(PYGPT_ISA_avx2)
#define PYGPT_AVX2 1
#endif
#if defined(PYGPT_AVX512) || defined(PYGPT_AVX2)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12's own _mm512_undefined_ps()
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#define PYGPT_INLINE inline __attribute__((always_inline))
#define PYGPT_LAMBDA __attribute__((always_inline))

namespace pygpt::PYGPT_ISA_NAMESPACE {

#if defined(PYGPT_AVX512)

constexpr int kLanes = 16;
struct F32 {
  __m512 v;
};
struct I32 {
  __m512i v;
};
struct U64 {  // lane i of `even` is lane 2i, of `odd` lane 2i + 1
  __m512i even, odd;
};
struct Mask {
  __mmask16 v;
};

PYGPT_INLINE F32 broadcast(float x) { return {_mm512_set1_ps(x)}; }
PYGPT_INLINE I32 broadcast(int32_t x) { return {_mm512_set1_epi32(x)}; }
PYGPT_INLINE F32 load(const float* p) { return {_mm512_loadu_ps(p)}; }
PYGPT_INLINE I32 load(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
PYGPT_INLINE void store(float* p, F32 x) { _mm512_storeu_ps(p, x.v); }
PYGPT_INLINE void store(int32_t* p, I32 x) { _mm512_storeu_si512(p, x.v); }

PYGPT_INLINE Mask first_lanes(int n) {
  return {static_cast<__mmask16>(n >= 16 ? 0xffff : (1u << n) - 1)};
}
PYGPT_INLINE F32 load_first(const float* p, int n) {
  return {_mm512_maskz_loadu_ps(first_lanes(n).v, p)};
}
PYGPT_INLINE void store_first(float* p, F32 x, int n) {
  _mm512_mask_storeu_ps(p, first_lanes(n).v, x.v);
}

PYGPT_INLINE F32 operator+(F32 a, F32 b) { return {_mm512_add_ps(a.v, b.v)}; }
PYGPT_INLINE F32 operator-(F32 a, F32 b) { return {_mm512_sub_ps(a.v, b.v)}; }
PYGPT_INLINE F32 operator*(F32 a, F32 b) { return {_mm512_mul_ps(a.v, b.v)}; }
PYGPT_INLINE F32 operator/(F32 a, F32 b) { return {_mm512_div_ps(a.v, b.v)}; }
PYGPT_INLINE F32 fma(F32 a, F32 b, F32 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
PYGPT_INLINE F32 max(F32 a, F32 b) { return {_mm512_max_ps(a.v, b.v)}; }
PYGPT_INLINE F32 min(F32 a, F32 b) { return {_mm512_min_ps(a.v, b.v)}; }

PYGPT_INLINE I32 operator+(I32 a, I32 b) { return {_mm512_add_epi32(a.v, b.v)}; }
PYGPT_INLINE I32 operator-(I32 a, I32 b) { return {_mm512_sub_epi32(a.v, b.v)}; }
PYGPT_INLINE I32 operator&(I32 a, I32 b) { return {_mm512_and_si512(a.v, b.v)}; }
PYGPT_INLINE I32 operator|(I32 a, I32 b) { return {_mm512_or_si512(a.v, b.v)}; }
PYGPT_INLINE I32 operator^(I32 a, I32 b) { return {_mm512_xor_si512(a.v, b.v)}; }
template <int kBits>
PYGPT_INLINE I32 shift_left(I32 a) {
  return {_mm512_slli_epi32(a.v, kBits)};
}
template <int kBits>  // zeros come in
PYGPT_INLINE I32 shift_right(I32 a) {
  return {_mm512_srli_epi32(a.v, kBits)};
}

PYGPT_INLINE Mask operator<(F32 a, F32 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
PYGPT_INLINE Mask operator<=(F32 a, F32 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LE_OQ)}; }
PYGPT_INLINE Mask operator==(F32 a, F32 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)}; }
PYGPT_INLINE Mask operator<(I32 a, I32 b) { return {_mm512_cmplt_epi32_mask(a.v, b.v)}; }
PYGPT_INLINE Mask operator==(I32 a, I32 b) { return {_mm512_cmpeq_epi32_mask(a.v, b.v)}; }
PYGPT_INLINE Mask operator&(Mask a, Mask b) { return {static_cast<__mmask16>(a.v & b.v)}; }
PYGPT_INLINE Mask operator|(Mask a, Mask b) { return {static_cast<__mmask16>(a.v | b.v)}; }
PYGPT_INLINE uint32_t bits(Mask m) { return m.v; }  // bit i is lane i
PYGPT_INLINE F32 select(Mask m, F32 a, F32 b) { return {_mm512_mask_blend_ps(m.v, b.v, a.v)}; }
PYGPT_INLINE I32 select(Mask m, I32 a, I32 b) { return {_mm512_mask_blend_epi32(m.v, b.v, a.v)}; }

PYGPT_INLINE I32 as_i32(F32 x) { return {_mm512_castps_si512(x.v)}; }
PYGPT_INLINE F32 as_f32(I32 x) { return {_mm512_castsi512_ps(x.v)}; }
PYGPT_INLINE I32 to_i32(F32 x) { return {_mm512_cvtps_epi32(x.v)}; }  // rounds to nearest even
PYGPT_INLINE F32 to_f32(I32 x) { return {_mm512_cvtepi32_ps(x.v)}; }
PYGPT_INLINE F32 floor(F32 x) {
  return {_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)};
}

PYGPT_INLINE U64 zero_u64() { return {_mm512_setzero_si512(), _mm512_setzero_si512()}; }
PYGPT_INLINE U64 operator+(U64 a, U64 b) {
  return {_mm512_add_epi64(a.even, b.even), _mm512_add_epi64(a.odd, b.odd)};
}
PYGPT_INLINE U64 to_u64(I32 x) {  // lanes taken as unsigned
  return {_mm512_and_si512(x.v, _mm512_set1_epi64(0xffffffff)), _mm512_srli_epi64(x.v, 32)};
}

PYGPT_INLINE void multiply_wide(I32 a, I32 b, I32& low, I32& high) {  // as unsigned
  const __m512i even = _mm512_mul_epu32(a.v, b.v);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(a.v, 32), _mm512_srli_epi64(b.v, 32));
  low.v = _mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32));
  high.v = _mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd);
}
PYGPT_INLINE F32 load_bf16(const uint16_t* p) {
  const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16))};
}
PYGPT_INLINE F32 load_f16(const uint16_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
PYGPT_INLINE void store_low_halves(uint16_t* p, I32 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(x.v));
}
PYGPT_INLINE void store_f16(uint16_t* p, F32 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

// Rows become columns: lane j of row i goes to lane i of row j.
PYGPT_INLINE void transpose(F32 (&r)[16]) {
  __m512 t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i].v, r[i + 1].v);
    t[i + 1] = _mm512_unpackhi_ps(r[i].v, r[i + 1].v);
  }
  __m512 u[16];
  for (int i = 0; i < 16; i += 4) {
    for (int j = 0; j < 2; ++j) {
      const __m512d a = _mm512_castps_pd(t[i + j]), b = _mm512_castps_pd(t[i + j + 2]);
      u[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
      u[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
  }
  for (int j = 0; j < 4; ++j) {
    const __m512 a = _mm512_shuffle_f32x4(u[j], u[4 + j], 0x88);
    const __m512 b = _mm512_shuffle_f32x4(u[j], u[4 + j], 0xdd);
    const __m512 c = _mm512_shuffle_f32x4(u[8 + j], u[12 + j], 0x88);
    const __m512 d = _mm512_shuffle_f32x4(u[8 + j], u[12 + j], 0xdd);
    r[j].v = _mm512_shuffle_f32x4(a, c, 0x88);
    r[4 + j].v = _mm512_shuffle_f32x4(b, d, 0x88);
    r[8 + j].v = _mm512_shuffle_f32x4(a, c, 0xdd);
    r[12 + j].v = _mm512_shuffle_f32x4(b, d, 0xdd);
  }
}

// Four sums, one of each vector, in two steps: lane 4 i + j of partial_sums is a part of that of
// r[j]; lane 4 i + j of join_sums is then that of vector j of parts[i].
PYGPT_INLINE F32 partial_sums(const F32 (&r)[4]) {
  __m512d two[2];
  for (int j = 0; j < 2; ++j) {
    const __m512 a = r[2 * j].v, b = r[2 * j + 1].v;
    two[j] = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
  }
  return {_mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(two[0], two[1])),
                        _mm512_castpd_ps(_mm512_unpackhi_pd(two[0], two[1])))};
}
PYGPT_INLINE F32 join_sums(const F32 (&parts)[4]) {
  const auto fold = [](__m512 a, __m512 b) PYGPT_LAMBDA {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  };
  return {fold(fold(parts[0].v, parts[1].v), fold(parts[2].v, parts[3].v))};
}
// Elements of even index, then those of odd index -> all in order, in place.
PYGPT_INLINE void interleave(float* p) {
  const __m512 even = _mm512_loadu_ps(p), odd = _mm512_loadu_ps(p + 16);
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  _mm512_storeu_ps(p, _mm512_permutex2var_ps(even, low, odd));
  _mm512_storeu_ps(p + 16, _mm512_permutex2var_ps(even, high, odd));
}

#elif defined(PYGPT_AVX2)

constexpr int kLanes = 8;
struct F32 {
  __m256 v;
};
struct I32 {
  __m256i v;
};
struct U64 {
  __m256i even, odd;
};
struct Mask {
  __m256 v;
};

PYGPT_INLINE F32 broadcast(float x) { return {_mm256_set1_ps(x)}; }
PYGPT_INLINE I32 broadcast(int32_t x) { return {_mm256_set1_epi32(x)}; }
PYGPT_INLINE F32 load(const float* p) { return {_mm256_loadu_ps(p)}; }
PYGPT_INLINE I32 load(const int32_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))};
}
PYGPT_INLINE void store(float* p, F32 x) { _mm256_storeu_ps(p, x.v); }
PYGPT_INLINE void store(int32_t* p, I32 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x.v);
}

PYGPT_INLINE Mask first_lanes(int n) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane))};
}
PYGPT_INLINE F32 load_first(const float* p, int n) {
  return {_mm256_maskload_ps(p, _mm256_castps_si256(first_lanes(n).v))};
}
PYGPT_INLINE void store_first(float* p, F32 x, int n) {
  _mm256_maskstore_ps(p, _mm256_castps_si256(first_lanes(n).v), x.v);
}

PYGPT_INLINE F32 operator+(F32 a, F32 b) { return {_mm256_add_ps(a.v, b.v)}; }
PYGPT_INLINE F32 operator-(F32 a, F32 b) { return {_mm256_sub_ps(a.v, b.v)}; }
PYGPT_INLINE F32 operator*(F32 a, F32 b) { return {_mm256_mul_ps(a.v, b.v)}; }
PYGPT_INLINE F32 operator/(F32 a, F32 b) { return {_mm256_div_ps(a.v, b.v)}; }
PYGPT_INLINE F32 fma(F32 a, F32 b, F32 c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
PYGPT_INLINE F32 max(F32 a, F32 b) { return {_mm256_max_ps(a.v, b.v)}; }
PYGPT_INLINE F32 min(F32 a, F32 b) { return {_mm256_min_ps(a.v, b.v)}; }

PYGPT_INLINE I32 operator+(I32 a, I32 b) { return {_mm256_add_epi32(a.v, b.v)}; }
PYGPT_INLINE I32 operator-(I32 a, I32 b) { return {_mm256_sub_epi32(a.v, b.v)}; }
PYGPT_INLINE I32 operator&(I32 a, I32 b) { return {_mm256_and_si256(a.v, b.v)}; }
PYGPT_INLINE I32 operator|(I32 a, I32 b) { return {_mm256_or_si256(a.v, b.v)}; }
PYGPT_INLINE I32 operator^(I32 a, I32 b) { return {_mm256_xor_si256(a.v, b.v)}; }
template <int kBits>
PYGPT_INLINE I32 shift_left(I32 a) {
  return {_mm256_slli_epi32(a.v, kBits)};
}
template <int kBits>
PYGPT_INLINE I32 shift_right(I32 a) {
  return {_mm256_srli_epi32(a.v, kBits)};
}

PYGPT_INLINE Mask operator<(F32 a, F32 b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)}; }
PYGPT_INLINE Mask operator<=(F32 a, F32 b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LE_OQ)}; }
PYGPT_INLINE Mask operator==(F32 a, F32 b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ)}; }
PYGPT_INLINE Mask operator<(I32 a, I32 b) {
  return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(b.v, a.v))};
}
PYGPT_INLINE Mask operator==(I32 a, I32 b) {
  return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(a.v, b.v))};
}
PYGPT_INLINE Mask operator&(Mask a, Mask b) { return {_mm256_and_ps(a.v, b.v)}; }
PYGPT_INLINE Mask operator|(Mask a, Mask b) { return {_mm256_or_ps(a.v, b.v)}; }
PYGPT_INLINE uint32_t bits(Mask m) { return static_cast<uint32_t>(_mm256_movemask_ps(m.v)); }
PYGPT_INLINE F32 select(Mask m, F32 a, F32 b) { return {_mm256_blendv_ps(b.v, a.v, m.v)}; }
PYGPT_INLINE I32 select(Mask m, I32 a, I32 b) {
  return {_mm256_castps_si256(
      _mm256_blendv_ps(_mm256_castsi256_ps(b.v), _mm256_castsi256_ps(a.v), m.v))};
}

PYGPT_INLINE I32 as_i32(F32 x) { return {_mm256_castps_si256(x.v)}; }
PYGPT_INLINE F32 as_f32(I32 x) { return {_mm256_castsi256_ps(x.v)}; }
PYGPT_INLINE I32 to_i32(F32 x) { return {_mm256_cvtps_epi32(x.v)}; }
PYGPT_INLINE F32 to_f32(I32 x) { return {_mm256_cvtepi32_ps(x.v)}; }
PYGPT_INLINE F32 floor(F32 x) { return {_mm256_floor_ps(x.v)}; }

PYGPT_INLINE U64 zero_u64() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
PYGPT_INLINE U64 operator+(U64 a, U64 b) {
  return {_mm256_add_epi64(a.even, b.even), _mm256_add_epi64(a.odd, b.odd)};
}
PYGPT_INLINE U64 to_u64(I32 x) {
  return {_mm256_and_si256(x.v, _mm256_set1_epi64x(0xffffffff)), _mm256_srli_epi64(x.v, 32)};
}

PYGPT_INLINE void multiply_wide(I32 a, I32 b, I32& low, I32& high) {
  const __m256i even = _mm256_mul_epu32(a.v, b.v);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(a.v, 32), _mm256_srli_epi64(b.v, 32));
  low.v = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
  high.v = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
}
PYGPT_INLINE F32 load_bf16(const uint16_t* p) {
  const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16))};
}
PYGPT_INLINE F32 load_f16(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
PYGPT_INLINE void store_low_halves(uint16_t* p, I32 x) {
  const __m256i low = _mm256_and_si256(x.v, _mm256_set1_epi32(0xffff));
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, low), 0xd8);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
PYGPT_INLINE void store_f16(uint16_t* p, F32 x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

PYGPT_INLINE void transpose(F32 (&r)[8]) {
  __m256 t[8], u[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i].v, r[i + 1].v);
    t[i + 1] = _mm256_unpackhi_ps(r[i].v, r[i + 1].v);
  }
  for (int i = 0; i < 8; i += 4) {
    for (int j = 0; j < 2; ++j) {
      u[i + 2 * j] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0x44);
      u[i + 2 * j + 1] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0xee);
    }
  }
  for (int j = 0; j < 4; ++j) {
    r[j].v = _mm256_permute2f128_ps(u[j], u[4 + j], 0x20);
    r[4 + j].v = _mm256_permute2f128_ps(u[j], u[4 + j], 0x31);
  }
}

PYGPT_INLINE F32 partial_sums(const F32 (&r)[4]) {
  return {_mm256_hadd_ps(_mm256_hadd_ps(r[0].v, r[1].v), _mm256_hadd_ps(r[2].v, r[3].v))};
}
PYGPT_INLINE F32 join_sums(const F32 (&parts)[2]) {
  return {_mm256_add_ps(_mm256_permute2f128_ps(parts[0].v, parts[1].v, 0x20),
                        _mm256_permute2f128_ps(parts[0].v, parts[1].v, 0x31))};
}
PYGPT_INLINE void interleave(float* p) {
  const __m256 even = _mm256_loadu_ps(p), odd = _mm256_loadu_ps(p + 8);
  const __m256 low = _mm256_unpacklo_ps(even, odd), high = _mm256_unpackhi_ps(even, odd);
  _mm256_storeu_ps(p, _mm256_permute2f128_ps(low, high, 0x20));
  _mm256_storeu_ps(p + 8, _mm256_permute2f128_ps(low, high, 0x31));
}

#else  // generic: GCC's and clang's vector extension

constexpr int kLanes = 4;
using Floats = float __attribute__((vector_size(16)));
using Ints = int32_t __attribute__((vector_size(16)));
using UInts = uint32_t __attribute__((vector_size(16)));
using Longs = uint64_t __attribute__((vector_size(16)));
struct F32 {
  Floats v;
};
struct I32 {
  Ints v;
};
struct U64 {
  Longs even, odd;
};
struct Mask {
  Ints v;  // -1 or 0
};

PYGPT_INLINE F32 broadcast(float x) { return {Floats{x, x, x, x}}; }
PYGPT_INLINE I32 broadcast(int32_t x) { return {Ints{x, x, x, x}}; }
PYGPT_INLINE F32 load(const float* p) {
  F32 x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
PYGPT_INLINE I32 load(const int32_t* p) {
  I32 x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
PYGPT_INLINE void store(float* p, F32 x) { std::memcpy(p, &x, sizeof x); }
PYGPT_INLINE void store(int32_t* p, I32 x) { std::memcpy(p, &x, sizeof x); }

PYGPT_INLINE Mask first_lanes(int n) { return {Ints{-(n > 0), -(n > 1), -(n > 2), -(n > 3)}}; }
PYGPT_INLINE F32 load_first(const float* p, int n) {
  F32 x = broadcast(0.0f);
  for (int i = 0; i < 4 && i < n; ++i) x.v[i] = p[i];
  return x;
}
PYGPT_INLINE void store_first(float* p, F32 x, int n) {
  for (int i = 0; i < 4 && i < n; ++i) p[i] = x.v[i];
}

PYGPT_INLINE F32 operator+(F32 a, F32 b) { return {a.v + b.v}; }
PYGPT_INLINE F32 operator-(F32 a, F32 b) { return {a.v - b.v}; }
PYGPT_INLINE F32 operator*(F32 a, F32 b) { return {a.v * b.v}; }
PYGPT_INLINE F32 operator/(F32 a, F32 b) { return {a.v / b.v}; }
PYGPT_INLINE F32 fma(F32 a, F32 b, F32 c) {
  for (int i = 0; i < 4; ++i) c.v[i] = __builtin_fmaf(a.v[i], b.v[i], c.v[i]);
  return c;
}
PYGPT_INLINE F32 max(F32 a, F32 b) { return {a.v > b.v ? a.v : b.v}; }
PYGPT_INLINE F32 min(F32 a, F32 b) { return {a.v < b.v ? a.v : b.v}; }

PYGPT_INLINE I32 operator+(I32 a, I32 b) {  // wraps, as vectors' instructions do
  return {reinterpret_cast<Ints>(reinterpret_cast<UInts>(a.v) + reinterpret_cast<UInts>(b.v))};
}
PYGPT_INLINE I32 operator-(I32 a, I32 b) {
  return {reinterpret_cast<Ints>(reinterpret_cast<UInts>(a.v) - reinterpret_cast<UInts>(b.v))};
}
PYGPT_INLINE I32 operator&(I32 a, I32 b) { return {a.v & b.v}; }
PYGPT_INLINE I32 operator|(I32 a, I32 b) { return {a.v | b.v}; }
PYGPT_INLINE I32 operator^(I32 a, I32 b) { return {a.v ^ b.v}; }
template <int kBits>
PYGPT_INLINE I32 shift_left(I32 a) {
  return {a.v << kBits};
}
template <int kBits>
PYGPT_INLINE I32 shift_right(I32 a) {
  for (int i = 0; i < 4; ++i) {
    a.v[i] = static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) >> kBits);
  }
  return a;
}

PYGPT_INLINE Mask operator<(F32 a, F32 b) { return {a.v < b.v}; }
PYGPT_INLINE Mask operator<=(F32 a, F32 b) { return {a.v <= b.v}; }
PYGPT_INLINE Mask operator==(F32 a, F32 b) { return {a.v == b.v}; }
PYGPT_INLINE Mask operator<(I32 a, I32 b) { return {a.v < b.v}; }
PYGPT_INLINE Mask operator==(I32 a, I32 b) { return {a.v == b.v}; }
PYGPT_INLINE Mask operator&(Mask a, Mask b) { return {a.v & b.v}; }
PYGPT_INLINE Mask operator|(Mask a, Mask b) { return {a.v | b.v}; }
PYGPT_INLINE uint32_t bits(Mask m) {
  return static_cast<uint32_t>((m.v[0] & 1) | (m.v[1] & 2) | (m.v[2] & 4) | (m.v[3] & 8));
}
PYGPT_INLINE F32 select(Mask m, F32 a, F32 b) { return {m.v ? a.v : b.v}; }
PYGPT_INLINE I32 select(Mask m, I32 a, I32 b) { return {m.v ? a.v : b.v}; }

PYGPT_INLINE I32 as_i32(F32 x) {
  I32 y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}
PYGPT_INLINE F32 as_f32(I32 x) {
  F32 y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}
PYGPT_INLINE I32 to_i32(F32 x) {
  I32 y;
  for (int i = 0; i < 4; ++i) {
    // Like x86, where what no integer can hold becomes INT32_MIN.
    const bool fits = x.v[i] >= -2147483648.0f && x.v[i] < 2147483648.0f;
    y.v[i] = fits ? static_cast<int32_t>(__builtin_rintf(x.v[i])) : INT32_MIN;
  }
  return y;
}
PYGPT_INLINE F32 to_f32(I32 x) {
  F32 y;
  for (int i = 0; i < 4; ++i) y.v[i] = static_cast<float>(x.v[i]);
  return y;
}
PYGPT_INLINE F32 floor(F32 x) {
  for (int i = 0; i < 4; ++i) x.v[i] = __builtin_floorf(x.v[i]);
  return x;
}

PYGPT_INLINE U64 zero_u64() { return {Longs{0, 0}, Longs{0, 0}}; }
PYGPT_INLINE U64 operator+(U64 a, U64 b) { return {a.even + b.even, a.odd + b.odd}; }
PYGPT_INLINE U64 to_u64(I32 x) {
  return {Longs{static_cast<uint32_t>(x.v[0]), static_cast<uint32_t>(x.v[2])},
          Longs{static_cast<uint32_t>(x.v[1]), static_cast<uint32_t>(x.v[3])}};
}

PYGPT_INLINE void multiply_wide(I32 a, I32 b, I32& low, I32& high) {
  for (int i = 0; i < 4; ++i) {
    const uint64_t product =
        static_cast<uint64_t>(static_cast<uint32_t>(a.v[i])) * static_cast<uint32_t>(b.v[i]);
    low.v[i] = static_cast<int32_t>(static_cast<uint32_t>(product));
    high.v[i] = static_cast<int32_t>(static_cast<uint32_t>(product >> 32));
  }
}
PYGPT_INLINE F32 load_bf16(const uint16_t* p) {
  I32 x;
  for (int i = 0; i < 4; ++i) x.v[i] = static_cast<int32_t>(static_cast<uint32_t>(p[i]) << 16);
  return as_f32(x);
}
PYGPT_INLINE F32 load_f16(const uint16_t* p) {
  F32 y;
  for (int i = 0; i < 4; ++i) {
    const uint32_t h = p[i], magnitude = h & 0x7fff;
    uint32_t b = (magnitude << 13) + (112u << 23);  // normal: move the exponent's bias
    if (magnitude >= 0x7c00) b = (magnitude << 13) | 0x7f800000;       // infinity, NaN
    const float subnormal = static_cast<float>(magnitude) * 0x1p-24f;  // or zero
    if (magnitude < 0x0400) std::memcpy(&b, &subnormal, 4);
    b |= (h & 0x8000) << 16;
    y.v[i] = std::bit_cast<float>(b);
  }
  return y;
}
PYGPT_INLINE void store_low_halves(uint16_t* p, I32 x) {
  for (int i = 0; i < 4; ++i) p[i] = static_cast<uint16_t>(x.v[i]);
}
PYGPT_INLINE void store_f16(uint16_t* p, F32 x) {
  for (int i = 0; i < 4; ++i) {
    uint32_t b;
    float f = x.v[i];
    std::memcpy(&b, &f, 4);
    const uint32_t sign = (b >> 16) & 0x8000, magnitude = b & 0x7fffffff;
    uint32_t h;
    if (magnitude > 0x7f800000) {
      h = 0x7e00 | ((magnitude >> 13) & 0x1ff);  // NaN
    } else if (magnitude >= 0x477ff000) {
      h = 0x7c00;  // rounds to infinity
    } else if (magnitude < 0x38800000) {
      std::memcpy(&f, &magnitude, 4);  // subnormal: adding 0.5 rounds at the last place, 2^-24
      f += 0.5f;
      std::memcpy(&b, &f, 4);
      h = b - 0x3f000000;
    } else {
      h = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    }
    p[i] = static_cast<uint16_t>(h | sign);
  }
}

PYGPT_INLINE void transpose(F32 (&r)[4]) {
  F32 t[4] = {r[0], r[1], r[2], r[3]};
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j < 4; ++j) t[j].v[i] = r[i].v[j];
  }
  for (int i = 0; i < 4; ++i) r[i] = t[i];
}

PYGPT_INLINE F32 partial_sums(const F32 (&r)[4]) {
  F32 x;
  for (int i = 0; i < 4; ++i) x.v[i] = (r[i].v[0] + r[i].v[1]) + (r[i].v[2] + r[i].v[3]);
  return x;
}
PYGPT_INLINE F32 join_sums(const F32 (&parts)[1]) { return parts[0]; }
PYGPT_INLINE void interleave(float* p) {
  const F32 even = load(p), odd = load(p + 4);
  for (int i = 0; i < 4; ++i) p[2 * i] = even.v[i], p[2 * i + 1] = odd.v[i];
}

#endif

// --- what follows is the same for all
// ----------------------------------------------------------------

PYGPT_INLINE Mask operator>(F32 a, F32 b) { return b < a; }
PYGPT_INLINE Mask operator>=(F32 a, F32 b) { return b <= a; }
PYGPT_INLINE Mask operator>(I32 a, I32 b) { return b < a; }
PYGPT_INLINE bool any(Mask m) { return bits(m) != 0; }
PYGPT_INLINE I32 lane_numbers() {
  alignas(64) static constexpr int32_t kNumbers[16] = {0, 1, 2,  3,  4,  5,  6,  7,
                                                       8, 9, 10, 11, 12, 13, 14, 15};
  return load(kNumbers);
}

PYGPT_INLINE Mask mask_of_bits(uint32_t bits) {
#if defined(PYGPT_AVX512)
  return {static_cast<__mmask16>(bits)};
#else
  alignas(32) static constexpr int32_t kBit[8] = {1, 2, 4, 8, 16, 32, 64, 128};
  return (broadcast(static_cast<int32_t>(bits)) & load(kBit)) == load(kBit);
#endif
}

// Rounds to the nearest even; a NaN stays one.
PYGPT_INLINE I32 to_bf16_bits(F32 x) {
  const I32 b = as_i32(x);
  const I32 odd = shift_right<16>(b) & broadcast(1);
  const I32 rounded = shift_right<16>(b + broadcast(0x7fff) + odd);
  return select(x == x, rounded, broadcast(0x7fc0));
}
PYGPT_INLINE void store_bf16(uint16_t* p, F32 x) {
#if defined(PYGPT_ISA_avx512_bf16)
  const __m256bh y = _mm512_cvtneps_pbh(x.v);
  std::memcpy(p, &y, sizeof y);
#else
  store_low_halves(p, to_bf16_bits(x));
#endif
}

// Words of two bf16: lane i holds low[i] in its low half and high[i] in the other.
PYGPT_INLINE F32 pair_bf16(F32 low, F32 high) {
#if defined(PYGPT_ISA_avx512_bf16)
  const __m512bh both = _mm512_cvtne2ps_pbh(high.v, low.v);
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                         8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return {_mm512_castsi512_ps(_mm512_permutexvar_epi16(order, reinterpret_cast<__m512i>(both)))};
#else
  return as_f32(to_bf16_bits(low) | shift_left<16>(to_bf16_bits(high)));
#endif
}

// Horizontal results, in a fixed order: halves first.
PYGPT_INLINE float sum(F32 x) {
#if defined(PYGPT_AVX512) || defined(PYGPT_AVX2)
#if defined(PYGPT_AVX512)
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(x.v), _mm512_extractf32x8_ps(x.v, 1));
#else
  const __m256 eight = x.v;
#endif
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#else
  return (x.v[0] + x.v[2]) + (x.v[1] + x.v[3]);
#endif
}
PYGPT_INLINE float max_lane(F32 x) {
#if defined(PYGPT_AVX512) || defined(PYGPT_AVX2)
#if defined(PYGPT_AVX512)
  const __m256 eight = _mm256_max_ps(_mm512_castps512_ps256(x.v), _mm512_extractf32x8_ps(x.v, 1));
#else
  const __m256 eight = x.v;
#endif
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
#else
  const auto greater = [](float a, float b) { return a > b ? a : b; };
  return greater(greater(x.v[0], x.v[2]), greater(x.v[1], x.v[3]));
#endif
}
PYGPT_INLINE uint64_t sum(U64 x) {
  uint64_t lane[kLanes];
  std::memcpy(lane, &x, sizeof x);
  uint64_t total = 0;
  for (const uint64_t l : lane) total += l;
  return total;
}

PYGPT_INLINE float first_lane(F32 x) {
#if defined(PYGPT_AVX512)
  return _mm512_cvtss_f32(x.v);
#elif defined(PYGPT_AVX2)
  return _mm256_cvtss_f32(x.v);
#else
  return x.v[0];
#endif
}

// 2^x by one polynomial with explicit fma. The coefficients make whole powers exact.
template <int kDegree>
PYGPT_INLINE F32 exp2_polynomial(F32 x, const float (&coefficients)[kDegree]) {
#if defined(PYGPT_AVX512)
  const F32 r = {_mm512_reduce_ps(x.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)};  // x - floor(x)
#else
  x = max(broadcast(-160.0f), min(broadcast(160.0f), x));
  const F32 whole = floor(x), r = x - whole;
#endif
  F32 p = broadcast(coefficients[0]);
  for (int i = 1; i < kDegree; ++i) p = fma(p, r, broadcast(coefficients[i]));
  p = fma(p, r, broadcast(1.0f));
#if defined(PYGPT_AVX512)
  return {_mm512_scalef_ps(p.v, x.v)};
#else
  // p * 2^whole in two factors, since 2^whole alone may be subnormal; the first product is exact.
  const I32 n = to_i32(whole), one = broadcast(127);
  const I32 half = shift_right<1>(n + broadcast(256)) - broadcast(128);
  return p * as_f32(shift_left<23>(half + one)) * as_f32(shift_left<23>(n - half + one));
#endif
}

// 2^x, the same bits on every instruction set: within 1.6e-7 (relative); 0 below -150, infinite
// from 128, NaN for NaN.
PYGPT_INLINE F32 exp2(F32 x) {
  return exp2_polynomial<5>(
      x, {0x1.eca6f0p-10f, 0x1.269deep-7f, 0x1.c94440p-5f, 0x1.ebd8a0p-3f, 0x1.62e4c8p-1f});
}
// max + log2(sum) for normal sums; -infinity for a sum of 0, NaN for NaN. One rounding at the
// end: max and the sum's exponent are added without loss.
PYGPT_INLINE F32 log2_of_sum(F32 max, F32 sum) {
  const I32 offset = broadcast(0x3f2aaaab);  // 2/3: the fraction is in [2/3, 4/3)
  const I32 b = as_i32(sum) - offset;
  const F32 whole = to_f32(shift_right<23>(b + broadcast(127 << 23)) - broadcast(127));
  const F32 fraction = as_f32((b & broadcast(0x7fffff)) + offset);
  // log2(x) = 2 / ln 2 * atanh(s), s = (x - 1) / (x + 1) within 1/5
  const F32 s = (fraction - broadcast(1.0f)) / (fraction + broadcast(1.0f)), s2 = s * s;
  F32 series = broadcast(2.88539008f / 9);
  for (const float n : {7.0f, 5.0f, 3.0f, 1.0f})
    series = fma(series, s2, broadcast(2.88539008f / n));
  const F32 high = max + whole, back = high - max;
  const F32 low = (max - (high - back)) + (whole - back);
  const F32 result = high + fma(series, s, low);
  return select(sum == broadcast(0.0f), broadcast(-__builtin_inff()), result + (sum - sum));
}
// Within 1.1e-4: for weights that are rounded to 16 bits next.
PYGPT_INLINE F32 exp2_coarse(F32 x) {
  return exp2_polynomial<3>(x, {0x1.4095eap-4f, 0x1.cf7a66p-3f, 0x1.640ea8p-1f});
}

}  // namespace pygpt::PYGPT_ISA_NAMESPACE
