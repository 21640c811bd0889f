// Softmax, loss and gradient of rows of logits in one visit. Three passes over a row that stays in
// cache: maximum, sum of exponentials, gradient. Recomputing the exponentials in the third pass
// (8 instructions for a vector) is cheaper than keeping them, and lets the gradient overwrite the
// logits. What it costs, 50,257 float32 logits: about 20 us a row with its gradient, 2 % of the
// matrix products around it.
#include <cmath>
#include <cstdint>

#include "core/parallel.h"
#include "cpu/element.h"

namespace pygpt::PYGPT_ISA_NAMESPACE {
namespace {

constexpr float kLog2E = 0x1.715476p+0f;
constexpr double kLn2 = 0x1.62e42fefa39efp-1;
constexpr int64_t kTaskElements = 1 << 13;

// The last n % kLanes elements of a row, padded with -inf.
template <class D>
PYGPT_INLINE F32 read_tail(const typename D::Type* p, int n) {
  return select(first_lanes(n), read_up_to<D>(p, n), broadcast(-__builtin_inff()));
}

template <class D>
PYGPT_INLINE float row_max(const typename D::Type* x, int64_t n) {
  F32 m[4];
  for (F32& lane : m) lane = broadcast(-__builtin_inff());
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    for (int j = 0; j < 4; ++j) m[j] = max(D::read(x + i + j * kLanes), m[j]);
  }
  for (; i + kLanes <= n; i += kLanes) m[0] = max(D::read(x + i), m[0]);
  if (i < n) m[0] = max(read_tail<D>(x + i, static_cast<int>(n - i)), m[0]);
  return max_lane(max(max(m[0], m[1]), max(m[2], m[3])));
}

// Sum of 2^((x - top) log2 e): float32 within blocks, so that rounding does not grow with n.
template <class D>
PYGPT_INLINE double row_sum(const typename D::Type* x, int64_t n, float top) {
  const F32 t = broadcast(top), scale = broadcast(kLog2E);
  const auto term = [&](F32 v) __attribute__((always_inline)) { return exp2((v - t) * scale); };
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += 64 * kLanes) {
    const int64_t end = begin + 64 * kLanes < n ? begin + 64 * kLanes : n;
    F32 sums[4];
    for (F32& s : sums) s = broadcast(0.0f);
    int64_t i = begin;
    for (; i + 4 * kLanes <= end; i += 4 * kLanes) {
      for (int j = 0; j < 4; ++j) sums[j] = sums[j] + term(D::read(x + i + j * kLanes));
    }
    for (; i + kLanes <= end; i += kLanes) sums[0] = sums[0] + term(D::read(x + i));
    if (i < end) sums[0] = sums[0] + term(read_tail<D>(x + i, static_cast<int>(end - i)));
    total += static_cast<double>(sum((sums[0] + sums[1]) + (sums[2] + sums[3])));
  }
  return total;
}

// gradient = scale (softmax(x) - [i = target]); x and gradient may be the same memory.
template <class D>
PYGPT_INLINE void row_gradient(const typename D::Type* x, typename D::Type* gradient, int64_t n,
                               float top, float log2_sum, float scale, int64_t target,
                               F32 at_target) {
  const F32 t = broadcast(top), log2_e = broadcast(kLog2E), shift = broadcast(-log2_sum);
  const F32 s = broadcast(scale);
  const auto term = [&](F32 v) __attribute__((always_inline)) {
    return s * exp2(fma(v - t, log2_e, shift));
  };
  // The target's is p - 1, which keeps its digits only if subtracted before rounding to 16 bits.
  at_target = term(at_target) - s;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) D::write(gradient + i, term(D::read(x + i)));
  if (i < n) {
    write_up_to<D>(gradient + i, term(read_tail<D>(x + i, static_cast<int>(n - i))), n - i);
  }
  write_up_to<D>(gradient + target, at_target, 1);
}

template <class D>
void row(const CrossEntropyArgs& a, int64_t r) {
  using T = typename D::Type;
  const T* x = static_cast<const T*>(a.logits) + r * a.logits_stride;
  T* gradient = a.gradient ? static_cast<T*>(a.gradient) + r * a.gradient_stride : nullptr;
  const int64_t target = a.targets[r];
  if (target == a.ignore_index) {
    a.losses[r] = 0.0f;
    for (int64_t i = 0; gradient && i < a.vocab; ++i) gradient[i] = 0;
    return;
  }
  T copy[kLanes];
  for (T& lane : copy) lane = x[target];
  const F32 at_target = D::read(copy);
  const float top = row_max<D>(x, a.vocab);
  const double log2_sum = std::log2(row_sum<D>(x, a.vocab, top));
  a.losses[r] = static_cast<float>(
      log2_sum * kLn2 + (static_cast<double>(top) - static_cast<double>(max_lane(at_target))));
  if (gradient) {
    const float scale = a.scales ? a.scale * a.scales[r] : a.scale;
    row_gradient<D>(x, gradient, a.vocab, top, static_cast<float>(log2_sum), scale, target,
                    at_target);
  }
}

}  // namespace

void cross_entropy(const CrossEntropyArgs& a) {
  const int64_t rows_per_task = a.vocab < kTaskElements ? kTaskElements / a.vocab : 1;
  parallel_tasks((a.rows + rows_per_task - 1) / rows_per_task, [&](int64_t task, int) {
    const int64_t begin = task * rows_per_task;
    const int64_t end = begin + rows_per_task < a.rows ? begin + rows_per_task : a.rows;
    for (int64_t r = begin; r < end; ++r) {
      switch (a.dtype) {
        case DType::kFloat32:
          row<Float>(a, r);
          break;
        case DType::kBFloat16:
          row<BFloat>(a, r);
          break;
        case DType::kFloat16:
          row<Half>(a, r);
          break;
      }
    }
  });
}

}  // namespace pygpt::PYGPT_ISA_NAMESPACE
