// Softmax cross-entropy of rows of logits, and its gradient in their place. A block per row reads
// it once for maximum and sum and, for the gradient, once more, by then from L2, and writes it.
#include "cuda/common.cuh"

namespace pygpt {
namespace {

constexpr int kThreads = 512;

// Calls f(index, x) on every element as a float and, with kWrite, stores what f leaves in x. 16
// bytes at a time; rows need not be aligned.
template <bool kWrite, class T, class F>
__device__ void visit(T* row, int64_t n, const F& f) {
  constexpr int kWide = 16 / sizeof(T);
  const auto one = [&](int64_t i) {
    float x = to_float(row[i]);
    f(i, x);
    if constexpr (kWrite) row[i] = from_float<T>(x);
  };
  const int64_t unaligned = (16 - reinterpret_cast<uintptr_t>(row) % 16) % 16 / sizeof(T);
  const int64_t head = least(unaligned, n), wide = (n - head) / kWide;
  if (threadIdx.x < head) one(threadIdx.x);
  for (int64_t w = threadIdx.x; w < wide; w += kThreads) {
    union {
      uint4 word;
      T elements[kWide];
    } pack;
    uint4* place = reinterpret_cast<uint4*>(row + head) + w;
    pack.word = *place;
#pragma unroll
    for (int i = 0; i < kWide; ++i) {
      float x = to_float(pack.elements[i]);
      f(head + w * kWide + i, x);
      if constexpr (kWrite) pack.elements[i] = from_float<T>(x);
    }
    if constexpr (kWrite) *place = pack.word;
  }
  if (const int64_t i = head + wide * kWide + threadIdx.x; i < n) one(i);
}

// A sum of 2^(x - max), and max.
struct Partial {
  float max, sum;
};
__device__ __forceinline__ Partial combine(Partial a, Partial b) {
  const float max = fmaxf(a.max, b.max), shift = max == -INFINITY ? 0.0f : max;
  return {max, a.sum * fast_exp2(a.max - shift) + b.sum * fast_exp2(b.max - shift)};
}

template <class T>
__global__ void __launch_bounds__(kThreads) cross_entropy(const CudaCrossEntropy a) {
  const int64_t r = blockIdx.x;
  T* row = static_cast<T*>(a.logits) + r * a.logits_stride;
  const int64_t target = a.targets[r];
  if (target == a.ignore_index) {
    if (threadIdx.x == 0) a.losses[r] = 0.0f;
    if (a.row_scale) visit<true>(row, a.vocab, [](int64_t, float& x) { x = 0.0f; });
    return;
  }
  const bool valid = target >= 0 && target < a.vocab;  // otherwise the loss is NaN
  const float target_logit = valid ? to_float(row[target]) : NAN;
  Partial mine{-INFINITY, 0.0f};
  visit<false>(row, a.vocab, [&](int64_t, float& x) {
    const float y = x * kLog2E;
    if (y > mine.max) {
      mine.sum *= fast_exp2(mine.max - y);
      mine.max = y;
    }
    // Equal infinities would be NaN; so is what lies beyond every maximum.
    mine.sum += y == -INFINITY ? 0.0f : fast_exp2(y - mine.max);
  });
#pragma unroll
  for (int mask = 1; mask < kWarp; mask *= 2) {
    mine = combine(mine, {shuffle_xor(mine.max, mask), shuffle_xor(mine.sum, mask)});
  }
  Partial* warps = reinterpret_cast<Partial*>(shared_memory());
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = mine;
  barrier();
  Partial all = warps[0];
  for (int w = 1; w < kThreads / kWarp; ++w) all = combine(all, warps[w]);
  const float lse = all.max + log2f(all.sum);
  if (threadIdx.x == 0) a.losses[r] = lse / kLog2E - target_logit;
  if (!a.row_scale) return;
  const float scale = a.row_scale[r * a.row_scale_stride];
  visit<true>(row, a.vocab, [&](int64_t i, float& x) {
    x = (fast_exp2(fmaf(x, kLog2E, -lse)) - (i == target ? 1.0f : 0.0f)) * scale;
  });
}

}  // namespace

void cuda_cross_entropy(const CudaCrossEntropy& a, const CudaLaunch& launch) {
  const auto run = [&](auto kernel) {
    launch_kernel(kernel, dim3(a.rows), kThreads, kThreads / kWarp * sizeof(Partial), launch.device,
                  launch.stream, a);
  };
  switch (a.dtype) {
    case DType::kFloat32:
      return run(cross_entropy<float>);
    case DType::kBFloat16:
      return run(cross_entropy<BFloat16>);
    case DType::kFloat16:
      return run(cross_entropy<Float16>);
  }
}

}  // namespace pygpt
