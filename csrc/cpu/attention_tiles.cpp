#include "cpu/attention_tiles.h"

namespace pygpt::PYGPT_ISA_NAMESPACE {
namespace {

PYGPT_INLINE float load_word(const float* p) {
  float x;
  std::memcpy(&x, p, 4);  // a pair of bf16 may stand at an odd multiple of two bytes
  return x;
}

// Rows are addressed from every third, which keeps the pointers of twelve rows in registers.
template <bool kPairs, int kRows, int kVecs>
void tile(Words a, const float* b, int64_t b_row, int64_t k, bool add, float* c, int64_t c_row) {
  constexpr int kPointers = (kRows + 2) / 3;
  const int64_t a_row = a.row;
  const float* rows[kPointers];
  F32 acc[kRows][kVecs];
  unroll<kPointers>([&](auto i) PYGPT_LAMBDA { rows[i] = a.data + 3 * i * a_row; });
  unroll<kRows * kVecs>([&](auto i) PYGPT_LAMBDA { acc[i / kVecs][i % kVecs] = broadcast(0.0f); });
  for (int64_t step = 0; step < k; ++step) {
    F32 column[kVecs];
    unroll<kVecs>([&](auto j) PYGPT_LAMBDA { column[j] = load(b + j * kLanes); });
    unroll<kRows>([&](auto i) PYGPT_LAMBDA {
      const F32 x = broadcast(load_word(rows[i / 3] + (i % 3) * a_row));
      unroll<kVecs>(
          [&](auto j) PYGPT_LAMBDA { acc[i][j] = multiply_add<kPairs>(x, column[j], acc[i][j]); });
    });
    unroll<kPointers>([&](auto i) PYGPT_LAMBDA {
      rows[i] += a.k;
      asm("" : "+r"(rows[i]));  // or GCC makes a pointer of every row, and spills them
    });
    b += b_row;
  }
  unroll<kRows * kVecs>([&](auto i) PYGPT_LAMBDA {
    float* out = c + i / kVecs * c_row + i % kVecs * kLanes;
    const F32 total = acc[i / kVecs][i % kVecs];
    store(out, add ? load(out) + total : total);
  });
}

// Calls the tile of `rows` rows in parts of kRows, 8, 4, 2 and 1, for few instantiations.
template <bool kPairs, int kRows, int kVecs>
void tile_rows(int rows, Words a, const float* b, int64_t b_row, int64_t k, bool add, float* c,
               int64_t c_row) {
  const auto advance = [&](int done) {
    rows -= done;
    a.data += done * a.row;
    c += done * c_row;
  };
  if (rows == kRows) return tile<kPairs, kRows, kVecs>(a, b, b_row, k, add, c, c_row);
  if constexpr (kRows > 8) {
    if (rows & 8) tile<kPairs, 8, kVecs>(a, b, b_row, k, add, c, c_row), advance(8);
  }
  if constexpr (kRows > 4) {
    if (rows & 4) tile<kPairs, 4, kVecs>(a, b, b_row, k, add, c, c_row), advance(4);
  }
  if (rows & 2) tile<kPairs, 2, kVecs>(a, b, b_row, k, add, c, c_row), advance(2);
  if (rows & 1) tile<kPairs, 1, kVecs>(a, b, b_row, k, add, c, c_row);
}

}  // namespace

template <bool kPairs>
void score_tiles(int rows, int64_t keys, const Words& a, const float* panels, int64_t k,
                 int64_t step, float* c, int64_t c_row) {
  const Words all = a;
  for (int64_t key = 0; key < keys; key += kPanel, panels += k * kPanel) {
    for (int64_t done = 0; done < k; done += step) {
      const Words part = {all.data + done, all.row, 1};
      const int64_t steps = k - done < step ? k - done : step;
      const float* b = panels + done * kPanel;
      if (keys - key > kLanes) {
        tile_rows<kPairs, kScoreRows, kScoreVecs>(rows, part, b, kPanel, steps, done > 0, c + key,
                                                  c_row);
      } else {
        tile_rows<kPairs, kScoreRows, 1>(rows, part, b, kPanel, steps, done > 0, c + key, c_row);
      }
    }
  }
}

template <bool kPairs>
void sum_tile(int rows, int vecs, const Words& a, const float* b, int64_t b_row, int64_t k,
              float* c, int64_t c_row) {
  if constexpr (kSumVecs == 4) {
    if (vecs == 4) return tile_rows<kPairs, kSumRows, 4>(rows, a, b, b_row, k, true, c, c_row);
    if (vecs == 3) return tile_rows<kPairs, kSumRows, 3>(rows, a, b, b_row, k, true, c, c_row);
  }
  if (vecs == 2) return tile_rows<kPairs, kSumRows, 2>(rows, a, b, b_row, k, true, c, c_row);
  tile_rows<kPairs, kSumRows, 1>(rows, a, b, b_row, k, true, c, c_row);
}

void copy_rows(DType dtype, const char* source, int64_t stride, int64_t rows, int64_t dim,
               float* out, int64_t pitch) {
  for (int64_t i = 0; i < rows; ++i, source += stride, out += pitch) {
    prefetch_row(dtype, source + kAhead * stride, dim);
    int64_t d = 0;
    for (; d + kLanes <= dim; d += kLanes) store(out + d, load_as_f32(dtype, source, d));
    if (d < dim) store(out + d, load_tail(dtype, source, d, dim - d));
  }
}

void write_rows(DType dtype, const float* source, int64_t pitch, int64_t rows, int64_t dim,
                float factor, char* out, int64_t stride) {
  const F32 f = broadcast(factor);
  for (int64_t i = 0; i < rows; ++i, source += pitch, out += stride) {
    int64_t d = 0;
    for (; d + kLanes <= dim; d += kLanes) store_as(dtype, out, d, load(source + d) * f);
    if (d < dim) store_tail(dtype, out, d, dim - d, load(source + d) * f);
  }
}

void dot_rows(DType dtype, const char* a, int64_t a_stride, const char* b, int64_t b_stride,
              int64_t rows, int64_t dim, float* out) {
  for (int64_t i = 0; i < rows; ++i, a += a_stride, b += b_stride) {
    prefetch_row(dtype, a + kAhead * a_stride, dim);
    prefetch_row(dtype, b + kAhead * b_stride, dim);
    F32 total = broadcast(0.0f);
    int64_t d = 0;
    for (; d + kLanes <= dim; d += kLanes) {
      total = fma(load_as_f32(dtype, a, d), load_as_f32(dtype, b, d), total);
    }
    if (d < dim) {
      total = fma(load_tail(dtype, a, d, dim - d), load_tail(dtype, b, d, dim - d), total);
    }
    out[i] = sum(total);
  }
}

constexpr int64_t kFewRows = 4;  // are moved word by word sooner than in transposed tiles

template <bool kPairs>
void pack_panels(DType dtype, const char* source, int64_t stride, int64_t rows, int64_t dim,
                 float* out) {
  const int64_t words = kPairs ? dim / 2 : dim;
  const DType as = kPairs ? DType::kFloat32 : dtype;  // a pair moves as one word
  for (int64_t first = 0; first < rows; first += kPanel, out += words * kPanel) {
    // Where no row is left score_tile is not asked for the second half of a panel.
    for (int64_t block = 0; block < kPanel && first + block < rows; block += kLanes) {
      const int64_t row = first + block;
      if (rows - row <= kFewRows && as == DType::kFloat32) {
        for (int64_t d = 0; d < words; ++d) store(out + d * kPanel + block, broadcast(0.0f));
        for (int64_t i = 0; i < rows - row; ++i) {
          const char* line = source + (row + i) * stride;
          float* column = out + block + i;
          for (int64_t d = 0; d < words; ++d) std::memcpy(column + d * kPanel, line + d * 4, 4);
        }
        continue;
      }
      for (int64_t d = 0; d < words; d += kLanes) {
        F32 lines[kLanes];
        const int64_t count = words - d;
        for (int i = 0; i < kLanes; ++i) {
          const char* line = source + (row + i) * stride;
          if (d == 0) prefetch_row(as, line + kLanes * stride, words);
          if (row + i >= rows) {
            lines[i] = broadcast(0.0f);
          } else {
            lines[i] = count >= kLanes ? load_as_f32(as, line, d) : load_tail(as, line, d, count);
          }
        }
        transpose(lines);
        const int used = count < kLanes ? static_cast<int>(count) : kLanes;
        for (int i = 0; i < used; ++i) store(out + (d + i) * kPanel + block, lines[i]);
      }
    }
  }
}

template void score_tiles<false>(int, int64_t, const Words&, const float*, int64_t, int64_t, float*,
                                 int64_t);
template void sum_tile<false>(int, int, const Words&, const float*, int64_t, int64_t, float*,
                              int64_t);
template void pack_panels<false>(DType, const char*, int64_t, int64_t, int64_t, float*);

#if defined(PYGPT_ISA_avx512_bf16)
template void score_tiles<true>(int, int64_t, const Words&, const float*, int64_t, int64_t, float*,
                                int64_t);
template void sum_tile<true>(int, int, const Words&, const float*, int64_t, int64_t, float*,
                             int64_t);
template void pack_panels<true>(DType, const char*, int64_t, int64_t, int64_t, float*);

void pack_pairs(const char* source, int64_t stride, int64_t rows, int64_t dim, float* out,
                int64_t pitch) {
  alignas(64) static constexpr uint16_t kOrder[2][32] = {
      {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
       8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47},
      {16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55,
       24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63}};
  const __m512i first = _mm512_load_si512(kOrder[0]), second = _mm512_load_si512(kOrder[1]);
  for (int64_t i = 0; i < rows; i += 2, out += pitch) {
    const char *even = source + i * stride, *odd = even + stride;
    prefetch_row(DType::kBFloat16, even + kAhead * stride, dim);
    prefetch_row(DType::kBFloat16, odd + kAhead * stride, dim);
    for (int64_t d = 0; d < dim; d += 32) {
      const __mmask32 used = dim - d >= 32 ? ~0u : (1u << (dim - d)) - 1;
      const __m512i low = _mm512_maskz_loadu_epi16(used, even + 2 * d);
      const __m512i high = _mm512_maskz_loadu_epi16(i + 1 < rows ? used : 0, odd + 2 * d);
      _mm512_storeu_si512(out + d, _mm512_permutex2var_epi16(low, first, high));
      if (d + 16 < dim) {
        _mm512_storeu_si512(out + d + 16, _mm512_permutex2var_epi16(low, second, high));
      }
    }
  }
}
#endif

}  // namespace pygpt::PYGPT_ISA_NAMESPACE
