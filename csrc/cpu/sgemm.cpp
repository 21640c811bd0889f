// Matrix products in float32, for the machines on which torch's BLAS runs below half of what they
// can do (MKL on AMD).
//
// The usual scheme: B is packed once into panels of kCols columns that all threads read, a task
// packs its rows of A into panels of kRows, and a register tile of kRows x kCols runs along k. Sums
// are float32 within kDepth steps of k and then added to C: one accumulator along the whole of k
// would double the error at k = 768. Every element of C is summed in one order, whatever the
// number of threads and wherever its row stands.
//
// 12 x 2 vectors (AVX-512) ties with 8 x 3, and 32 columns divide the widths of real models.
#include <cstdint>

#include "core/parallel.h"
#include "core/scratch.h"
#include "cpu/kernels.h"
#include "cpu/vec.h"

namespace pygpt::PYGPT_ISA_NAMESPACE {
namespace {

constexpr int kRows = kLanes == 16 ? 12 : kLanes == 8 ? 6 : 4;
constexpr int kCols = 2 * kLanes;
constexpr int64_t kDepth = 192;
constexpr int64_t kLongDepth = 8 * kDepth;    // of k that is packed at a time
constexpr int64_t kPackedElements = 1 << 20;  // of B: stays in the shared cache
constexpr int64_t kTaskPanels = 8;            // of A: stays in a core's own cache

int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

PYGPT_INLINE F32 load_up_to(const float* p, int64_t n) {
  return n >= kLanes ? load(p) : load_first(p, static_cast<int>(n));
}

// `width` lines along which k runs become kLines numbers for each k; missing lines are zeros. May
// write kLanes - 1 numbers past the end.
template <int kLines>
void pack(const float* p, int64_t line_stride, int64_t k_stride, int64_t width, int64_t depth,
          float* out) {
  if (line_stride == 1) {
    for (int64_t k = 0; k < depth; ++k) {
      for (int i = 0; i < kLines; i += kLanes) {
        const int64_t left = width - i;
        store(out + k * kLines + i,
              left > 0 ? load_up_to(p + k * k_stride + i, left) : broadcast(0.0f));
      }
    }
    return;
  }
  for (int i = 0; i < kLines; i += kLanes) {
    const int lines = static_cast<int>(min(kLanes, kLines - i));
    for (int64_t k = 0; k < depth; k += kLanes) {
      F32 tile[kLanes];
      for (int j = 0; j < kLanes; ++j) {
        tile[j] = j < lines && i + j < width ? load_up_to(p + (i + j) * line_stride + k, depth - k)
                                             : broadcast(0.0f);
      }
      transpose(tile);
      const int steps = static_cast<int>(min(kLanes, depth - k));
      if (steps == kLanes) {
        for (int j = 0; j < kLanes; ++j) store(out + (k + j) * kLines + i, tile[j]);
      } else {
        for (int j = 0; j < kLanes; ++j) {
          if (j < steps) store(out + (k + j) * kLines + i, tile[j]);
        }
      }
    }
  }
}

// The tile's sums over `depth` steps, added to C or (`fresh`) written there on top of the bias.
void multiply(const float* a, const float* b, int64_t depth, float* c, int64_t c_stride,
              int64_t rows, int64_t cols, bool fresh, const float* bias) {
  F32 sum[kRows][2];
  for (int r = 0; r < kRows; ++r) {
    sum[r][0] = sum[r][1] = broadcast(0.0f);
    __builtin_prefetch(c + min(r, rows - 1) * c_stride);
  }
  for (int64_t k = 0; k < depth; ++k) {
    const F32 left = load(b), right = load(b + kLanes);
    for (int r = 0; r < kRows; ++r) {
      const F32 x = broadcast(a[r]);
      sum[r][0] = fma(x, left, sum[r][0]);
      sum[r][1] = fma(x, right, sum[r][1]);
    }
    a += kRows;
    b += kCols;
  }
  for (int v = 0; v < 2; ++v) {
    const int64_t n = cols - v * kLanes;
    if (n <= 0) return;
    const F32 start = fresh && bias ? load_up_to(bias + v * kLanes, n) : broadcast(0.0f);
    for (int r = 0; r < kRows; ++r) {
      if (r >= rows) break;
      float* out = c + r * c_stride + v * kLanes;
      const F32 total = sum[r][v] + (fresh ? start : load_up_to(out, n));
      if (n >= kLanes) {
        store(out, total);
      } else {
        store_first(out, total, static_cast<int>(n));
      }
    }
  }
}

}  // namespace

void sgemm(const SgemmArgs& g) {
  const int64_t row_panels = ceil_div(g.m, kRows);
  const int64_t wanted = ceil_div(row_panels, 4 * num_threads());
  const int64_t task_panels = min(wanted, kTaskPanels);
  const int64_t tasks = ceil_div(row_panels, task_panels);
  const int64_t long_depth = min(g.k, kLongDepth);
  const int64_t cols =
      min(ceil_div(g.n, kCols), ceil_div(kPackedElements, long_depth * kCols)) * kCols;
  const int64_t a_size = task_panels * kRows * kDepth + kLanes;
  auto* packed_b = reinterpret_cast<float*>(
      call_scratch((cols * long_depth + num_threads() * a_size) * sizeof(float)));
  float* packed_a = packed_b + cols * long_depth;

  for (int64_t k0 = 0; k0 < g.k; k0 += long_depth) {
    const int64_t depth = min(long_depth, g.k - k0);
    for (int64_t n0 = 0; n0 < g.n; n0 += cols) {
      const int64_t width = min(cols, g.n - n0);
      const int64_t panels = ceil_div(width, kCols);
      // Blocks of one depth, since the longest decides the error. Block kb of panel p begins at
      // (kb step panels + p (depth of the block)) kCols.
      const int64_t k_blocks = ceil_div(depth, kDepth);
      const int64_t step = ceil_div(depth, k_blocks * kLanes) * kLanes;
      parallel_tasks(panels * k_blocks, [&](int64_t task, int) {
        const int64_t kb = task / panels * step, p = task % panels;
        const int64_t block = min(step, depth - kb);
        pack<kCols>(g.b + (k0 + kb) * g.b_k_stride + (n0 + p * kCols) * g.b_n_stride, g.b_n_stride,
                    g.b_k_stride, width - p * kCols, block,
                    packed_b + (kb * panels + p * block) * kCols);
      });
      parallel_tasks(tasks, [&](int64_t task, int worker) {
        float* rows = packed_a + worker * a_size;
        const int64_t m0 = task * task_panels * kRows;
        const int64_t height = min(task_panels * kRows, g.m - m0);
        for (int64_t kb = 0; kb < depth; kb += step) {
          const int64_t block = min(step, depth - kb);
          for (int64_t r = 0; r < height; r += kRows) {
            pack<kRows>(g.a + (m0 + r) * g.a_m_stride + (k0 + kb) * g.a_k_stride, g.a_m_stride,
                        g.a_k_stride, height - r, block, rows + r * block);
          }
          const bool fresh = k0 + kb == 0 && !g.accumulate;
          for (int64_t p = 0; p < panels; ++p) {
            const float* panel = packed_b + (kb * panels + p * block) * kCols;
            const int64_t n = n0 + p * kCols;
            for (int64_t r = 0; r < height; r += kRows) {
              multiply(rows + r * block, panel, block, g.c + (m0 + r) * g.c_stride + n, g.c_stride,
                       height - r, width - p * kCols, fresh, g.bias ? g.bias + n : nullptr);
            }
          }
        }
      });
    }
  }
}

}  // namespace pygpt::PYGPT_ISA_NAMESPACE
