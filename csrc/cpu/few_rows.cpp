// Products of few rows with a matrix, as in a step of generation: reading the matrix is what takes
// the time, so it is read once, in the order in which it lies, and packed nowhere. Where a column's
// numbers follow each other (a layer's weight as torch keeps it) each column is a dot product;
// where a row's do (as GPT-2's files keep it) rows of the matrix are added up.
#include "cpu/few_rows.h"

#include <algorithm>
#include <cstring>

#include "core/parallel.h"
#include "core/scratch.h"
#include "cpu/attention_tiles.h"
#include "cpu/element.h"

namespace pygpt::PYGPT_ISA_NAMESPACE {
namespace {

constexpr int kLines = 4;                        // of the matrix, read together; as partial_sums
constexpr int kMostRows = kLanes == 16 ? 4 : 2;  // in registers with them
constexpr int64_t kBlockSteps = 96;  // summed at a time, as lines are; more would lose accuracy
constexpr int64_t kBlockLines = 192;
constexpr int64_t kTaskBytes = 1 << 17;                     // of the matrix
constexpr int64_t kAheadBytes = 1 << 14, kAheadLines = 16;  // asked for before they are read
constexpr int64_t kSums = 2048;  // rows times columns of a task that adds up lines

// How kStep numbers are read, as kVecs vectors, and multiplied; or as kSplit vectors of float32.
struct Singles {
  static constexpr int64_t kStep = kLanes, kSize = 4;
  static constexpr int kVecs = 1, kSplit = 1;
  static PYGPT_INLINE void read(const char* p, F32* x) {
    x[0] = load(reinterpret_cast<const float*>(p));
  }
  static PYGPT_INLINE void split(const char* p, F32* x) { read(p, x); }
  static PYGPT_INLINE F32 dot(F32 a, F32 b, F32 sum) { return fma(a, b, sum); }
};
struct BFloats {  // as words of two where the CPU multiplies them, else even before odd ones
  static constexpr int64_t kStep = 2 * kLanes, kSize = 2;
  static constexpr int kVecs = kHasPairs ? 1 : 2, kSplit = 2;
  static PYGPT_INLINE void split(const char* p, F32* x) {
    const I32 words = load(reinterpret_cast<const int32_t*>(p));
    x[0] = as_f32(shift_left<16>(words));
    x[1] = as_f32(words & broadcast(static_cast<int32_t>(0xffff0000)));
  }
  static PYGPT_INLINE void read(const char* p, F32* x) {
    if constexpr (kHasPairs) {
      x[0] = load(reinterpret_cast<const float*>(p));
    } else {
      split(p, x);
    }
  }
  static PYGPT_INLINE F32 dot(F32 a, F32 b, F32 sum) { return multiply_add<kHasPairs>(a, b, sum); }
};

// A step whose first `count` numbers are those at p, with zeros behind them; `part` may hold it.
template <class Unit>
PYGPT_INLINE const char* padded(const char* p, int64_t count,
                                char (&part)[Unit::kStep * Unit::kSize]) {
  if (count >= Unit::kStep) return p;
  std::memset(part, 0, sizeof part);
  if (count > 0) std::memcpy(part, p, count * Unit::kSize);
  return part;
}
template <class Unit>
PYGPT_INLINE void read_first(const char* p, int64_t count, F32* x) {
  char part[Unit::kStep * Unit::kSize];
  Unit::read(padded<Unit>(p, count, part), x);
}

// partial_sums of kRows rows with kLines lines of the matrix.
template <class Unit, int kRows>
PYGPT_INLINE void multiply(const float* rows, int64_t pitch, const char* lines, int64_t stride,
                           int64_t ahead, int64_t last, int64_t depth, float* out,
                           int64_t out_pitch) {
  const char* line[kLines];
  F32 sums[kRows][kLines], total[kRows];
  unroll<kLines>([&](auto j)
                     PYGPT_LAMBDA { line[j] = lines + std::min<int64_t>(j, last) * stride; });
  unroll<kRows>([&](auto r) PYGPT_LAMBDA { total[r] = broadcast(0.0f); });
  const auto add = [&](int64_t count) PYGPT_LAMBDA {
    F32 x[kRows][Unit::kVecs];
    unroll<kRows>([&](auto r) PYGPT_LAMBDA {
      for (int v = 0; v < Unit::kVecs; ++v) x[r][v] = load(rows + r * pitch + v * kLanes);
    });
    unroll<kLines>([&](auto j) PYGPT_LAMBDA {
      if (ahead) __builtin_prefetch(line[j] + ahead, 0, 2);
      F32 w[Unit::kVecs];
      read_first<Unit>(line[j], count, w);
      unroll<kRows>([&](auto r) PYGPT_LAMBDA {
        for (int v = 0; v < Unit::kVecs; ++v) sums[r][j] = Unit::dot(x[r][v], w[v], sums[r][j]);
      });
      line[j] += Unit::kStep * Unit::kSize;
    });
    rows += Unit::kVecs * kLanes;
  };
  for (int64_t begin = 0; begin < depth; begin += kBlockSteps * Unit::kStep) {
    const int64_t end = std::min(depth, begin + kBlockSteps * Unit::kStep);
    unroll<kRows * kLines>([&](auto i)
                               PYGPT_LAMBDA { sums[i / kLines][i % kLines] = broadcast(0.0f); });
    int64_t k = begin;
    for (; k + Unit::kStep <= end; k += Unit::kStep) add(Unit::kStep);
    if (k < end) add(end - k);
    unroll<kRows>([&](auto r) PYGPT_LAMBDA { total[r] = total[r] + partial_sums(sums[r]); });
  }
  unroll<kRows>([&](auto r) PYGPT_LAMBDA { store(out + r * out_pitch, total[r]); });
}

// Numbers [n, n + kLanes) of row m of the result, as far as they exist.
PYGPT_INLINE void put(const GemmArgs& g, int64_t m, int64_t n, F32 total) {
  if (g.bias) total = total + read_up_to<Float>(g.bias + n, g.n - n);
  const int64_t at = m * g.c_stride + n;
  if (g.c_type == DType::kFloat32) {
    write_up_to<Float>(static_cast<float*>(g.c) + at, total, g.n - n);
  } else {
    write_up_to<BFloat>(static_cast<uint16_t*>(g.c) + at, total, g.n - n);
  }
}

template <class Unit>
void dot_columns(const GemmArgs& g) {
  constexpr int kParts = kLanes / kLines;
  const int64_t steps = (g.k + Unit::kStep - 1) / Unit::kStep;
  const int64_t pitch = steps * Unit::kVecs * kLanes, stride = g.b_n_stride * Unit::kSize;
  float* rows = reinterpret_cast<float*>(call_scratch(g.m * pitch * sizeof(float)));
  for (int64_t m = 0; m < g.m; ++m) {
    const char* row = static_cast<const char*>(g.a) + m * g.a_m_stride * Unit::kSize;
    for (int64_t step = 0; step < steps; ++step) {
      F32 x[Unit::kVecs];
      const int64_t k = step * Unit::kStep;
      read_first<Unit>(row + k * Unit::kSize, g.k - k, x);
      for (int v = 0; v < Unit::kVecs; ++v) {
        store(rows + m * pitch + (step * Unit::kVecs + v) * kLanes, x[v]);
      }
    }
  }
  // Whole groups of lines ahead, so that every line of the matrix is asked for once.
  const int64_t line_bytes = std::max<int64_t>(stride, 1), group = kLines * line_bytes;
  const int64_t ahead = (kAheadBytes + group - 1) / group * group;
  const int64_t width = std::max<int64_t>(1, kTaskBytes / (kLanes * line_bytes)) * kLanes;
  run_tasks((g.n + width - 1) / width, g.m * g.n * g.k, [&](int64_t task, int) {
    for (int64_t n = task * width; n < std::min(g.n, (task + 1) * width); n += kLanes) {
      float sums[kFewRows][kParts * kLanes];
      for (int part = 0; part < kParts; ++part) {
        const int64_t first = n + part * kLines, last = g.n - 1 - first;
        if (last < 0) break;  // lanes that are not written
        const char* lines = static_cast<const char*>(g.b) + first * stride;
        const auto some = [&]<int kRows>(std::integral_constant<int, kRows>,
                                         int64_t m) PYGPT_LAMBDA {
          multiply<Unit, kRows>(rows + m * pitch, pitch, lines, stride, m ? 0 : ahead, last, g.k,
                                sums[m] + part * kLanes, kParts * kLanes);
        };
        int64_t m = 0;
        for (; m + kMostRows <= g.m; m += kMostRows) {
          some(std::integral_constant<int, kMostRows>(), m);
        }
        for (; m + 2 <= g.m; m += 2) some(std::integral_constant<int, 2>(), m);
        if (m < g.m) some(std::integral_constant<int, 1>(), m);
      }
      for (int64_t m = 0; m < g.m; ++m) {
        F32 parts[kParts];
        for (int part = 0; part < kParts; ++part) parts[part] = load(sums[m] + part * kLanes);
        put(g, m, n, join_sums(parts));
      }
    }
  });
}

// sums += rows of factors x kLines lines of the matrix, over `width` columns.
template <class Unit>
PYGPT_INLINE void add_lines(const float* factors, int64_t pitch, int64_t rows, const char* lines,
                            int64_t stride, int64_t last, int64_t ahead, int64_t width, float* sums,
                            int64_t sum_pitch) {
  const char* line[kLines];
  unroll<kLines>([&](auto j) PYGPT_LAMBDA { line[j] = lines + j * stride; });
  for (int64_t c = 0; c < width; c += Unit::kStep, sums += Unit::kStep) {
    F32 w[kLines][Unit::kSplit];
    unroll<kLines>([&](auto j) PYGPT_LAMBDA {
      if (ahead) __builtin_prefetch(line[j] + ahead, 0, 2);
      char part[Unit::kStep * Unit::kSize];
      Unit::split(padded<Unit>(line[j], j <= last ? width - c : 0, part), w[j]);
      line[j] += Unit::kStep * Unit::kSize;
    });
    for (int64_t m = 0; m < rows; ++m) {
      unroll<Unit::kSplit>([&](auto v) PYGPT_LAMBDA {
        float* at = sums + m * sum_pitch + v * kLanes;
        F32 sum = load(at);
        unroll<kLines>([&](auto j) PYGPT_LAMBDA {
          sum = fma(broadcast(factors[m * pitch + j]), w[j][v], sum);
        });
        store(at, sum);
      });
    }
  }
}

template <class Unit>
void add_up_lines(const GemmArgs& g) {
  const int64_t pitch = (g.k + kLines - 1) / kLines * kLines, stride = g.b_k_stride * Unit::kSize;
  float* factors = reinterpret_cast<float*>(call_scratch(g.m * pitch * sizeof(float)));
  for (int64_t m = 0; m < g.m; ++m) {
    const char* row = static_cast<const char*>(g.a) + m * g.a_m_stride * Unit::kSize;
    for (int64_t k = 0; k < pitch; k += kLanes) {
      const F32 x = Unit::kSize == 4
                        ? read_up_to<Float>(reinterpret_cast<const float*>(row) + k, g.k - k)
                        : read_up_to<BFloat>(reinterpret_cast<const uint16_t*>(row) + k, g.k - k);
      store_first(factors + m * pitch + k, x,
                  static_cast<int>(std::min<int64_t>(pitch - k, kLanes)));
    }
  }
  // Long pieces of lines, as far as every thread gets some.
  const int64_t share = (g.n / (2 * num_threads()) + 63) / 64 * 64;
  const int64_t most = std::clamp<int64_t>(share, 64, g.m <= 4 ? kSums / 4 : kSums / kFewRows);
  run_tasks((g.n + most - 1) / most, g.m * g.n * g.k, [&](int64_t task, int) {
    const int64_t n = task * most, width = std::min(most, g.n - n);
    const char* columns = static_cast<const char*>(g.b) + n * Unit::kSize;
    float total[kSums], sums[kSums];
    std::memset(total, 0, g.m * most * sizeof(float));
    for (int64_t begin = 0; begin < g.k; begin += kBlockLines) {
      std::memset(sums, 0, g.m * most * sizeof(float));
      for (int64_t k = begin; k < std::min(g.k, begin + kBlockLines); k += kLines) {
        const bool asks = k + kAheadLines < g.k;
        add_lines<Unit>(factors + k, pitch, g.m, columns + k * stride, stride, g.k - 1 - k,
                        asks ? kAheadLines * stride : 0, width, sums, most);
      }
      for (int64_t i = 0; i < g.m * most; i += kLanes) {
        store(total + i, load(total + i) + load(sums + i));
      }
    }
    for (int64_t m = 0; m < g.m; ++m) {
      float* row = total + m * most;
      for (int64_t c = 0; c < width; c += kLanes) {
        if (Unit::kSplit == 2 && c % Unit::kStep == 0) interleave(row + c);
        put(g, m, n + c, load(row + c));
      }
    }
  });
}

}  // namespace

bool is_of_few_rows(const GemmArgs& g) {
  return g.m <= kFewRows && g.a_type == g.b_type && g.a_k_stride == 1 && !g.accumulate;
}

void few_rows(const GemmArgs& g) {
  const bool wide = g.a_type == DType::kFloat32;
  if (g.b_k_stride == 1) {
    (wide ? dot_columns<Singles> : dot_columns<BFloats>)(g);
  } else {
    (wide ? add_up_lines<Singles> : add_up_lines<BFloats>)(g);
  }
}

}  // namespace pygpt::PYGPT_ISA_NAMESPACE
