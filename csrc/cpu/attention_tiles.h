// Micro-kernels and packing for attention: register tiles of C += A B, where A is read one word at
// a time and broadcast, and B is read in whole vectors.
//
// A word is 4 bytes: one float, or, where the CPU multiplies bf16 itself, a pair of bf16 that are
// neighbours along the summed dimension. Strides and lengths along that dimension count words, so
// one code serves both.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

#include "cpu/kernels.h"
#include "cpu/vec.h"

namespace pygpt::PYGPT_ISA_NAMESPACE {

#if defined(PYGPT_ISA_avx512_bf16)
constexpr bool kHasPairs = true;
#else
constexpr bool kHasPairs = false;
#endif

// Calls f(0) ... f(n - 1) with constant arguments. A plain loop leaves the accumulators in memory:
// GCC splits arrays into registers before it unrolls.
template <class F, int... kIndex>
PYGPT_INLINE void unroll(const F& f, std::integer_sequence<int, kIndex...>) {
  (f(std::integral_constant<int, kIndex>()), ...);
}
template <int kCount, class F>
PYGPT_INLINE void unroll(const F& f) {
  unroll(f, std::make_integer_sequence<int, kCount>());
}

// Register tiles: scores are kScoreRows x kScoreVecs, sums over keys or queries kSumRows x
// kSumVecs.
#if defined(PYGPT_AVX512)
constexpr int kScoreRows = 12, kScoreVecs = 2, kSumRows = 6, kSumVecs = 4;
#elif defined(PYGPT_AVX2)
constexpr int kScoreRows = 6, kScoreVecs = 2, kSumRows = 6, kSumVecs = 2;
#else
constexpr int kScoreRows = 4, kScoreVecs = 2, kSumRows = 4, kSumVecs = 2;
#endif
constexpr int kPanel = kScoreVecs * kLanes;                // keys (or queries) in one packed panel
constexpr int kSoftmaxRows = kLanes == 16 ? kSumRows : 2;  // at a time, as registers allow

struct Words {  // a matrix of words; `row` and `k` are the strides of its two dimensions
  const float* data;
  int64_t row, k;
};

// C[rows, keys] = A B, B in panels of kPanel keys; rows is at most kScoreRows, and keys is rounded
// up to whole vectors. At most `step` words of k are summed in one register.
template <bool kPairs>
void score_tiles(int rows, int64_t keys, const Words& a, const float* panels, int64_t k,
                 int64_t step, float* c, int64_t c_row);
// C[rows, vecs * kLanes] += A B; sums start at zero, so that a long reduction made of many calls is
// summed in two levels. rows and vecs are any number up to those of the tile.
template <bool kPairs>
void sum_tile(int rows, int vecs, const Words& a, const float* b, int64_t b_row, int64_t k,
              float* c, int64_t c_row);

// a * b + c over lanes, which are words.
template <bool kPairs>
PYGPT_INLINE F32 multiply_add(F32 a, F32 b, F32 c) {
#if defined(PYGPT_ISA_avx512_bf16)
  if constexpr (kPairs) {
    return {
        _mm512_dpbf16_ps(c.v, reinterpret_cast<__m512bh>(a.v), reinterpret_cast<__m512bh>(b.v))};
  }
#endif
  return fma(a, b, c);
}

// Lanes of one row of any dtype as floats, and back; the tails are the last `count` (< kLanes)
// elements and touch nothing behind them.
PYGPT_INLINE F32 load_as_f32(DType dtype, const char* p, int64_t index) {
  if (dtype == DType::kFloat32) return load(reinterpret_cast<const float*>(p) + index);
  const uint16_t* half = reinterpret_cast<const uint16_t*>(p) + index;
  return dtype == DType::kBFloat16 ? load_bf16(half) : load_f16(half);
}
PYGPT_INLINE F32 load_tail(DType dtype, const char* p, int64_t index, int64_t count) {
  char part[kLanes * 4] = {};
  const int64_t size = dtype == DType::kFloat32 ? 4 : 2;
  std::memcpy(part, p + index * size, count * size);
  return load_as_f32(dtype, part, 0);
}

PYGPT_INLINE void store_as(DType dtype, char* p, int64_t index, F32 x) {
  if (dtype == DType::kFloat32) return store(reinterpret_cast<float*>(p) + index, x);
  uint16_t* half = reinterpret_cast<uint16_t*>(p) + index;
  dtype == DType::kBFloat16 ? store_bf16(half, x) : store_f16(half, x);
}

PYGPT_INLINE void store_tail(DType dtype, char* p, int64_t index, int64_t count, F32 x) {
  char part[kLanes * 4];
  const int64_t size = dtype == DType::kFloat32 ? 4 : 2;
  store_as(dtype, part, 0, x);
  std::memcpy(p + index * size, part, count * size);
}

// Rows of a head stand far apart, which no hardware prefetcher follows.
constexpr int64_t kAhead = 8;
template <int kLocality = 3>  // 3: into the first cache, 2: into the second
PYGPT_INLINE void prefetch_row(DType dtype, const char* row, int64_t dim) {
  const int64_t bytes = dim * (dtype == DType::kFloat32 ? 4 : 2);
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(row + i, 0, kLocality);
}

// rows x dim of `source` -> float rows of `pitch`, with zeros from dim to pitch.
void copy_rows(DType dtype, const char* source, int64_t stride, int64_t rows, int64_t dim,
               float* out, int64_t pitch);
// Float rows -> rows of any dtype, times `factor`.
void write_rows(DType dtype, const float* source, int64_t pitch, int64_t rows, int64_t dim,
                float factor, char* out, int64_t stride);
// rows x dim -> ceil(rows / kPanel) panels of [dim words][kPanel], zeros where rows end.
template <bool kPairs>
void pack_panels(DType dtype, const char* source, int64_t stride, int64_t rows, int64_t dim,
                 float* out);
// bf16 rows -> [ceil(rows / 2)][pitch] words, each the pair (row 2i, row 2i + 1) of one column.
void pack_pairs(const char* source, int64_t stride, int64_t rows, int64_t dim, float* out,
                int64_t pitch);

// out[i] = the sum of a * b over row i of each.
void dot_rows(DType dtype, const char* a, int64_t a_stride, const char* b, int64_t b_stride,
              int64_t rows, int64_t dim, float* out);

}  // namespace pygpt::PYGPT_ISA_NAMESPACE
