// Matrix products, for the machines on which torch's BLAS runs below half of what they can do (MKL
// in float32 on AMD), and for bfloat16 products whose operands or result are wider: weights are
// rounded while they are packed, gradients are added up in float32, and no copy is made of either.
//
// The usual scheme: A is packed into panels of kRows rows, B of kCols columns, and a register tile
// of kRows x kCols runs along k. Every thread packs for itself what it multiplies: a part of the
// operand of fewer lines, which it keeps from task to task, and chunks of the other, which stay in
// its core's cache. Packing once for all threads costs more: what another core has packed arrives a
// cache line at a time. Both are packed in words of 32 bits: one float32, or, where the CPU
// multiplies them, two bfloat16 that follow each other along k. Sums are float32 within kDepth
// words of k and then added up: one accumulator along the whole of k would double the error of
// float32 at k = 768. Every element of C is summed in one order, whatever the number of threads and
// wherever its row stands (few_rows.cpp, for up to 16 rows, has its own).
//
// 12 x 2 vectors (AVX-512) ties with 8 x 3, and 32 columns divide the widths of real models.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "core/parallel.h"
#include "core/scratch.h"
#include "cpu/element.h"
#include "cpu/few_rows.h"

namespace pygpt::PYGPT_ISA_NAMESPACE {
namespace {

constexpr int kRows = kLanes == 16 ? 12 : kLanes == 8 ? 6 : 4;
constexpr int kCols = 2 * kLanes;
constexpr int64_t kLongDepth = 768;       // words of k that are packed at a time, at most
constexpr int64_t kPartWords = 1 << 19;   // of one operand, kept by a thread
constexpr int64_t kChunkWords = 1 << 16;  // of the other: stays in the core's own cache

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Words of one float32.
struct Single {
  static constexpr int kSteps = 1;  // of k in a word
  static constexpr int64_t kDepth = 192;
  static PYGPT_INLINE F32 dot(F32 a, F32 b, F32 sum) { return fma(a, b, sum); }
  // One word for each of `lines` neighbours, of k and on.
  template <class D>
  static PYGPT_INLINE F32 across(const typename D::Type* p, int64_t, int64_t lines, int64_t) {
    return read_up_to<D>(p, lines);
  }
  // Words of one line, where `depth` numbers are left.
  template <class D>
  static PYGPT_INLINE F32 along(const typename D::Type* p, int64_t depth) {
    return read_up_to<D>(p, depth);
  }
};

// A float32 that takes part in a product in bfloat16.
struct Rounded {
  using Type = float;
  static PYGPT_INLINE F32 read(const float* p) {
    return as_f32(shift_left<16>(to_bf16_bits(load(p))));
  }
};

#if defined(PYGPT_ISA_avx512_bf16)
// Words of two bfloat16; the lower half is the earlier one.
struct Pair {
  static constexpr int kSteps = 2;
  static constexpr int64_t kDepth = kLongDepth;
  static PYGPT_INLINE F32 dot(F32 a, F32 b, F32 sum) {
    return {_mm512_dpbf16_ps(sum.v, (__m512bh)a.v, (__m512bh)b.v)};
  }
  template <class D>
  static PYGPT_INLINE F32 across(const typename D::Type* p, int64_t k_stride, int64_t lines,
                                 int64_t depth) {
    const F32 low = read_up_to<D>(p, lines);
    const F32 high = depth > 1 ? read_up_to<D>(p + k_stride, lines) : broadcast(0.0f);
    if constexpr (sizeof(typename D::Type) == 2) {  // nothing to round
      return as_f32(shift_right<16>(as_i32(low)) | as_i32(high));
    }
    return pair_bf16(low, high);
  }
  template <class D>
  static PYGPT_INLINE F32 along(const typename D::Type* p, int64_t depth) {
    if constexpr (sizeof(typename D::Type) == 2) {
      if (depth >= 2 * kLanes) return load(reinterpret_cast<const float*>(p));
    }
    const F32 first = read_up_to<D>(p, depth), second = read_up_to<D>(p + kLanes, depth - kLanes);
    return {_mm512_castsi512_ps((__m512i)_mm512_cvtne2ps_pbh(second.v, first.v))};
  }
};
#endif

// Panels of kLines lines with the words of each k side by side; lines from `width` on are zeros.
// May write kLanes - 1 words past the end of a panel.
template <class Unit, class D, int kLines>
void pack(const void* from, int64_t line_stride, int64_t k_stride, int64_t width, int64_t depth,
          float* out, int64_t panel_stride) {
  const auto* p = static_cast<const typename D::Type*>(from);
  if (line_stride == 1) {
    for (int64_t k = 0; k < depth; k += Unit::kSteps) {
      float* panel = out + k / Unit::kSteps * kLines;
      for (int64_t line = 0; line < width; line += kLines, panel += panel_stride) {
        for (int i = 0; i < kLines; i += kLanes) {
          store(panel + i, Unit::template across<D>(p + k * k_stride + line + i, k_stride,
                                                    width - line - i, depth - k));
        }
      }
    }
    return;
  }
  constexpr int kStep = kLanes * Unit::kSteps;
  for (int64_t line = 0; line < width; line += kLines, out += panel_stride) {
    for (int i = 0; i < kLines; i += kLanes) {
      const int64_t lines = std::min<int64_t>(std::min(kLanes, kLines - i), width - line - i);
      for (int64_t k = 0; k < depth; k += kStep) {
        F32 tile[kLanes];
        for (int j = 0; j < kLanes; ++j) {
          tile[j] = j < lines
                        ? Unit::template along<D>(p + (line + i + j) * line_stride + k, depth - k)
                        : broadcast(0.0f);
        }
        transpose(tile);
        const int64_t words = ceil_div(depth - k, Unit::kSteps);
        float* to = out + k / Unit::kSteps * kLines + i;
        for (int j = 0; j < kLanes; ++j) {
          if (j < words) store(to + j * kLines, tile[j]);
        }
      }
    }
  }
}

// F is how float32 is read: Float or Rounded.
template <class Unit, class F, int kLines>
void pack(const void* from, DType type, int64_t begin, int64_t line_stride, int64_t k,
          int64_t k_stride, int64_t width, int64_t depth, float* out, int64_t panel_stride) {
  const int64_t at = begin * line_stride + k * k_stride;
  if (type == DType::kFloat32) {
    pack<Unit, F, kLines>(static_cast<const float*>(from) + at, line_stride, k_stride, width, depth,
                          out, panel_stride);
  } else {
    pack<Unit, BFloat, kLines>(static_cast<const uint16_t*>(from) + at, line_stride, k_stride,
                               width, depth, out, panel_stride);
  }
}

using Tile = F32[kRows][2];

// The tile's sums over `words` words, in blocks of at most `block`.
template <class Unit>
PYGPT_INLINE void multiply(const float* a, const float* b, int64_t words, int64_t block,
                           Tile& total) {
  for (int64_t begin = 0; begin < words; begin += block) {
    F32 sum[kRows][2];
    for (auto& row : sum) row[0] = row[1] = broadcast(0.0f);
    const float* end = a + std::min(block, words - begin) * kRows;
    for (; a < end; a += kRows, b += kCols) {
      const F32 left = load(b), right = load(b + kLanes);
      for (int r = 0; r < kRows; ++r) {
        const F32 x = broadcast(a[r]);
        sum[r][0] = Unit::dot(x, left, sum[r][0]);
        sum[r][1] = Unit::dot(x, right, sum[r][1]);
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < 2; ++v) total[r][v] = begin ? total[r][v] + sum[r][v] : sum[r][v];
    }
  }
}

template <class D>
PYGPT_INLINE void add(Tile& total, const void* from, int64_t stride, int64_t rows, int64_t cols) {
  const auto* p = static_cast<const typename D::Type*>(from);
  for (int r = 0; r < kRows && r < rows; ++r) {
    for (int v = 0; v < 2; ++v) {
      total[r][v] = total[r][v] + read_up_to<D>(p + r * stride + v * kLanes, cols - v * kLanes);
    }
  }
}

template <class D>
PYGPT_INLINE void put(const Tile& total, void* to, int64_t stride, int64_t rows, int64_t cols) {
  auto* p = static_cast<typename D::Type*>(to);
  for (int r = 0; r < kRows && r < rows; ++r) {
    for (int v = 0; v < 2; ++v) {
      write_up_to<D>(p + r * stride + v * kLanes, total[r][v], cols - v * kLanes);
    }
  }
}

// An operand as it is packed.
struct Side {
  int64_t lines, panels, stride;  // the latter in words, from panel to panel
};

// What a thread has packed, in a cache line of its own.
struct alignas(64) Held {
  int64_t part = -1;
};

template <class Unit, class F>
void product(const GemmArgs& g) {
  const int64_t all_words = ceil_div(g.k, Unit::kSteps);
  const int64_t words = ceil_div(all_words, ceil_div(all_words, kLongDepth));  // packed at a time
  const int64_t long_depth = words * Unit::kSteps;
  const int64_t threads = num_threads();
  const int64_t work = g.m * g.n * g.k / 10;  // packed operands keep the units busy
  const Side a = {g.m, ceil_div(g.m, kRows), words * kRows + kLanes};
  const Side b = {g.n, ceil_div(g.n, kCols), words * kCols};
  const bool keeps_a = g.m <= g.n;
  const Side kept = keeps_a ? a : b, other = keeps_a ? b : a;
  // A task multiplies one of `parts` of the kept operand by one of `chunks` of the other. Threads
  // pack least when what each multiplies is a square.
  const int64_t square =
      std::lround(std::sqrt(static_cast<double>(threads * kept.lines) / other.lines));
  const int64_t parts =
      std::clamp(square, ceil_div(kept.panels * kept.stride, kPartWords), kept.panels);
  const int64_t most = std::max<int64_t>(1, kChunkWords / other.stride);
  const int64_t chunks =
      std::min(other.panels,
               ceil_div(std::max(ceil_div(other.panels, most), 4 * threads), threads) * threads);
  const int64_t workers = std::min(threads, parts * chunks);
  const int64_t part_size = ceil_div(kept.panels, parts) * kept.stride;
  const int64_t size = part_size + ceil_div(other.panels, chunks) * other.stride;

  const bool wide = g.c_type == DType::kFloat32;
  const bool partial = !wide && g.k > long_depth;  // sums between parts of k are float32
  auto* packed = reinterpret_cast<float*>(
      call_scratch((workers * size + (partial ? g.m * g.n : 0)) * sizeof(float)));
  float* between = packed + workers * size;

  for (int64_t k0 = 0; k0 < g.k; k0 += long_depth) {
    const int64_t depth = std::min(long_depth, g.k - k0);
    const int64_t depth_words = ceil_div(depth, Unit::kSteps);
    // Blocks of one depth, since the longest decides the error.
    const int64_t block = ceil_div(depth_words, ceil_div(depth_words, Unit::kDepth));
    const bool first = k0 == 0, last = k0 + depth == g.k;
    const auto pack_panels = [&](bool of_a, int64_t begin, int64_t end, float* to) {
      if (of_a) {
        pack<Unit, F, kRows>(g.a, g.a_type, begin * kRows, g.a_m_stride, k0, g.a_k_stride,
                             std::min(end * kRows, g.m) - begin * kRows, depth, to, a.stride);
      } else {
        pack<Unit, F, kCols>(g.b, g.b_type, begin * kCols, g.b_n_stride, k0, g.b_k_stride,
                             std::min(end * kCols, g.n) - begin * kCols, depth, to, b.stride);
      }
    };
    const auto multiply_panels = [&](const float* left, int64_t m, const float* right, int64_t n) {
      const int64_t height = g.m - m, some = g.n - n, at = m * g.c_stride + n;
      auto* out = static_cast<char*>(g.c) + at * (wide ? 4 : 2);
      float* sums = between + m * g.n + n;
      for (int i = 0; i < kRows && i < height; ++i) {
        __builtin_prefetch(out + i * g.c_stride * (wide ? 4 : 2), 1);
      }
      Tile total;
      multiply<Unit>(left, right, depth_words, block, total);
      if (first && g.bias) add<Float>(total, g.bias + n, 0, kRows, some);
      if (wide && (!first || g.accumulate)) {
        add<Float>(total, out, g.c_stride, height, some);
      } else if (!wide && first && g.accumulate) {
        add<BFloat>(total, out, g.c_stride, height, some);
      } else if (!wide && !first) {
        add<Float>(total, sums, g.n, height, some);
      }
      if (wide) {
        put<Float>(total, out, g.c_stride, height, some);
      } else if (last) {
        put<BFloat>(total, out, g.c_stride, height, some);
      } else {
        put<Float>(total, sums, g.n, height, some);
      }
    };
    std::vector<Held> holds(workers);
    run_tasks(parts * chunks, work, [&](int64_t task, int worker) {
      const int64_t part = task / chunks, chunk = task % chunks;
      const int64_t first_kept = part * kept.panels / parts;
      const int64_t end_kept = (part + 1) * kept.panels / parts;
      const int64_t begin = chunk * other.panels / chunks;
      const int64_t end = (chunk + 1) * other.panels / chunks;
      float* own_part = packed + worker * size;
      float* own_chunk = own_part + part_size;
      if (holds[worker].part != part) pack_panels(keeps_a, first_kept, end_kept, own_part);
      holds[worker].part = part;
      pack_panels(!keeps_a, begin, end, own_chunk);
      for (int64_t i = first_kept; i < end_kept; ++i) {
        const float* panel = own_part + (i - first_kept) * kept.stride;
        for (int64_t j = begin; j < end; ++j) {
          const float* against = own_chunk + (j - begin) * other.stride;
          if (keeps_a) {
            multiply_panels(panel, i * kRows, against, j * kCols);
          } else {
            multiply_panels(against, j * kRows, panel, i * kCols);
          }
        }
      }
    });
  }
}

}  // namespace

void gemm(const GemmArgs& g) {
  if (is_of_few_rows(g)) return few_rows(g);
  if (g.a_type == DType::kFloat32 && g.b_type == DType::kFloat32) {
    product<Single, Float>(g);
  } else {
#if defined(PYGPT_ISA_avx512_bf16)
    product<Pair, Float>(g);  // which rounds
#else
    product<Single, Rounded>(g);
#endif
  }
}

}  // namespace pygpt::PYGPT_ISA_NAMESPACE
