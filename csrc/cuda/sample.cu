// One token per row of logits, as csrc/cpu/sample.cpp defines it, bit for bit: integer weights,
// whose sums do not depend on their order. A block per row; thresholds by radix selection over the
// keys' bits in three passes, then indices by two-level prefix sums. No sort, no wait for the host.
#include "cuda/common.cuh"

namespace pygpt {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / kWarp, kBins = 2048;
constexpr int32_t kPositiveInfinity = 0x7f800000;
constexpr int32_t kNegativeInfinity = static_cast<int32_t>(0xff800000) ^ 0x7fffffff;

struct Shared {
  unsigned long long bins[kBins];
  int64_t warps[kWarps];
  int64_t above;
  int32_t found;
};

// Float bits <-> integers of the same order (an involution).
__device__ __forceinline__ int32_t ordered(int32_t bits) {
  return bits ^ ((bits >> 31) & 0x7fffffff);
}
__device__ __forceinline__ int32_t key_of(float x) {
  return ordered(float_bits(add(x, 0.0f)));  // -0 becomes +0
}

template <class T, class Combine>
__device__ T block_reduce(T x, Shared& shared, Combine combine) {
  x = warp_reduce(x, combine);
  barrier();
  if (threadIdx.x % kWarp == 0) shared.warps[threadIdx.x / kWarp] = x;
  barrier();
  x = static_cast<T>(shared.warps[0]);
  for (int w = 1; w < kWarps; ++w) x = combine(x, static_cast<T>(shared.warps[w]));
  return x;
}

__device__ __forceinline__ int64_t warp_inclusive_sum(int64_t x) {
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const int64_t left = shuffle_up(x, step);
    if (threadIdx.x % kWarp >= step) x += left;
  }
  return x;
}

// The key at which the mass of keys, taken from the greatest down, first reaches `need`, and the
// mass of the keys above it. Sum is wide enough for all masses together.
struct Cut {
  int32_t key;
  int64_t above;
};
template <class Sum, class Mass>
__device__ Cut select(const int32_t* keys, int n, int64_t need, Shared& shared, const Mass& mass) {
  Sum* bins = reinterpret_cast<Sum*>(shared.bins);
  uint32_t prefix = 0;  // the digits found so far, of keys shifted to unsigned order
  int64_t above = 0;
  for (int shift = 21; shift >= -1; shift -= 11) {  // digits: bits 31-21, 20-10, 9-0
    const int low = greatest(shift, 0), width = shift < 0 ? 10 : 11;
    barrier();
    for (int b = threadIdx.x; b < kBins; b += kThreads) bins[b] = 0;
    barrier();
    for (int i = threadIdx.x; i < n; i += kThreads) {
      const uint32_t key = static_cast<uint32_t>(keys[i]) ^ 0x80000000u;
      if (low + width < 32 && key >> (low + width) != prefix) continue;
      if (const Sum m = static_cast<Sum>(mass(i, keys[i]))) {
        atomicAdd(&bins[key >> low & ((1u << width) - 1)], m);
      }
    }
    barrier();
    // Each thread looks at kBins / kThreads neighbouring bins, counted from the greatest.
    constexpr int kMine = kBins / kThreads;
    const int top = (1 << width) - 1 - kMine * static_cast<int>(threadIdx.x);
    int64_t mine = 0;
    for (int b = top; b > top - kMine && b >= 0; --b) mine += static_cast<int64_t>(bins[b]);
    int64_t before = warp_inclusive_sum(mine) - mine;
    if (threadIdx.x % kWarp == kWarp - 1) shared.warps[threadIdx.x / kWarp] = before + mine;
    barrier();
    for (int w = 0; w < static_cast<int>(threadIdx.x) / kWarp; ++w) before += shared.warps[w];
    before += above;
    if (before < need && need <= before + mine) {  // exactly one thread
      int b = top;
      while (before + static_cast<int64_t>(bins[b]) < need)
        before += static_cast<int64_t>(bins[b--]);
      shared.found = b;
      shared.above = before;
    }
    barrier();
    prefix = prefix << width | static_cast<uint32_t>(shared.found);
    above = shared.above;
  }
  return {static_cast<int32_t>(prefix ^ 0x80000000u), above};
}

// The first index at which the running sum of masses exceeds rest(total).
template <class Mass, class Rest>
__device__ int locate(const int32_t* keys, int n, Shared& shared, const Mass& mass,
                      const Rest& rest_of) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int chunk = (n + kThreads - 1) / kThreads * kWarp;  // per warp, whole rows of lanes
  const int begin = warp * chunk, end = least(begin + chunk, n);
  int64_t sum = 0;
  for (int i = begin + lane; i < end; i += kWarp) sum += mass(i, keys[i]);
  sum = warp_reduce(sum, [](int64_t x, int64_t y) { return x + y; });
  barrier();
  if (lane == 0) shared.warps[warp] = sum;
  barrier();
  int64_t total = 0;
  for (int w = 0; w < kWarps; ++w) total += shared.warps[w];
  int64_t rest = rest_of(total);
  int owner = 0;
  while (owner < kWarps - 1 && rest >= shared.warps[owner]) rest -= shared.warps[owner++];
  if (warp == owner) {
    for (int i = begin; i < end; i += kWarp) {
      const int64_t running = warp_inclusive_sum(
          i + lane < end ? static_cast<int64_t>(mass(i + lane, keys[i + lane])) : 0);
      const int64_t here = shuffle(running, kWarp - 1);
      if (rest < here) {
        const int first =
            warp_reduce(running > rest ? lane : kWarp, [](int x, int y) { return least(x, y); });
        if (lane == 0) shared.found = i + first;
        break;
      }
      rest -= here;
    }
  }
  barrier();
  return shared.found;
}

template <class T>
__global__ void __launch_bounds__(kThreads) sample(const SampleArgs a, int32_t* all_keys) {
  Shared& shared = *reinterpret_cast<Shared*>(shared_memory());
  const int64_t row = blockIdx.x;
  const int n = static_cast<int>(a.vocab);
  const SampleParameters& p = a.parameters[row * a.parameters_stride];  // read where it is used
  int32_t* keys = all_keys + row * a.vocab;
  const T* logits = static_cast<const T*>(a.logits) + row * a.logits_stride;
  for (int i = threadIdx.x; i < n; i += kThreads) {
    const float x = to_float(logits[i]);
    keys[i] = key_of(a.bias ? add(x, a.bias[row * a.bias_stride + i]) : x);
  }
  if (a.history_length) {
    barrier();
    const int64_t* history = a.history + row * a.history_length;
    for (int64_t j = threadIdx.x; j < a.history_length; j += kThreads) {
      const int64_t token = history[j];
      if (token < 0 || token >= n) continue;
      int count = 0;
      bool first = true;
      for (int64_t m = 0; m < a.history_length; ++m) {
        count += history[m] == token;
        first &= m >= j || history[m] != token;
      }
      if (!first) continue;
      const float z = bits_float(ordered(keys[token]));
      const auto repetition = static_cast<float>(p.repetition_penalty);
      const float penalty =
          add(static_cast<float>(p.presence_penalty),
              multiply(static_cast<float>(p.frequency_penalty), static_cast<float>(count)));
      keys[token] =
          key_of(add(z > 0.0f ? divide(z, repetition) : multiply(z, repetition), -penalty));
    }
  }
  barrier();
  int32_t high = kNegativeInfinity, low = kPositiveInfinity;
  for (int i = threadIdx.x; i < n; i += kThreads) {
    high = greatest(high, keys[i]);
    low = least(low, keys[i]);
  }
  high = block_reduce(high, shared, [](int32_t x, int32_t y) { return greatest(x, y); });
  low = block_reduce(low, shared, [](int32_t x, int32_t y) { return least(x, y); });
  const bool good =
      low >= kNegativeInfinity && high < kPositiveInfinity && high > kNegativeInfinity;
  int token = -1;
  if (good && p.temperature == 0.0) {
    token = locate(
        keys, n, shared, [=](int, int32_t key) { return key == high; },
        [](int64_t) -> int64_t { return 0; });
  } else if (good) {
    // A token is still in the race if its key is above `cut`, or equal and its index before
    // `tie_end`.
    int32_t cut = kNegativeInfinity;
    int tie_end = n;
    if (p.top_k > 0 && p.top_k < static_cast<double>(n)) {
      const auto k = static_cast<int64_t>(p.top_k);
      const Cut found = select<unsigned>(keys, n, k, shared, [](int, int32_t) { return 1u; });
      cut = found.key;
      tie_end = 1 + locate(
                        keys, n, shared, [=](int, int32_t key) { return key == cut; },
                        [=](int64_t) { return k - found.above - 1; });
    }
    const float max = bits_float(ordered(high));
    const float scale = least(divide(0x1.715476p+0f, static_cast<float>(p.temperature)),
                              0x1.fffffep127f);  // log2(e) / temperature
    const auto weight = [=](int i, int32_t key) -> int64_t {
      if (key < cut || (key == cut && i >= tie_end)) return 0;
      const float x = multiply(add(max, -bits_float(ordered(key))), scale);
      const float u = x < 48.0f ? x : 48.0f;
      const auto whole = static_cast<int32_t>(u);
      const float f = add(u, -static_cast<float>(whole));
      float y = -0x1.ef66d2p-11f;  // 2^-f on [0, 1)
      y = add(multiply(y, f), 0x1.2da7d6p-7f);
      y = add(multiply(y, f), -0x1.c4fef8p-5f);
      y = add(multiply(y, f), 0x1.ebe392p-3f);
      y = add(multiply(y, f), -0x1.62e3bcp-1f);
      y = add(multiply(y, f), 1.0f);
      return static_cast<int64_t>(static_cast<int32_t>(multiply(y, 0x1p24f))) << 16 >> whole;
    };
    if (p.top_p < 1.0) {
      int64_t total = 0;
      for (int i = threadIdx.x; i < n; i += kThreads) total += weight(i, keys[i]);
      total = block_reduce(total, shared, [](int64_t x, int64_t y) { return x + y; });
      const auto wanted = static_cast<int64_t>(ceil(p.top_p * static_cast<double>(total)));
      const int64_t need = least(greatest(wanted, int64_t{1}), total);
      const Cut found = select<unsigned long long>(keys, n, need, shared, weight);
      // Of the tokens at the cut, which all weigh the same, as many as it takes.
      const int64_t each = weight(0, found.key > cut ? found.key : greatest(cut, found.key));
      const int64_t ties = (need - found.above + each - 1) / each;
      const int last = locate(
          keys, n, shared,
          [=](int i, int32_t key) { return key == found.key && (key > cut || i < tie_end); },
          [=](int64_t) { return ties - 1; });
      cut = found.key;
      tie_end = last + 1;
    }
    const int64_t lowest = p.min_p > 0.0 ? static_cast<int64_t>(ceil(p.min_p * 0x1p40)) : 0;
    const double uniform = a.uniforms[row];
    const auto final_weight = [=](int i, int32_t key) -> int64_t {
      if (key < cut || (key == cut && i >= tie_end)) return 0;
      const int64_t w = weight(i, key);
      return w >= lowest ? w : 0;
    };
    token = locate(keys, n, shared, final_weight, [=](int64_t total) {
      const auto rest = static_cast<int64_t>(uniform * static_cast<double>(total));
      return greatest(least(rest, total - 1), int64_t{0});
    });
  }
  if (threadIdx.x == 0) a.tokens[row] = token;
}

}  // namespace

void cuda_sample(const SampleArgs& a, int32_t* keys, const CudaLaunch& launch) {
  const auto run = [&](auto kernel) {
    launch_kernel(kernel, dim3(a.rows), kThreads, sizeof(Shared), launch.device, launch.stream, a,
                  keys);
  };
  switch (a.dtype) {
    case DType::kFloat32:
      return run(sample<float>);
    case DType::kBFloat16:
      return run(sample<BFloat16>);
    case DType::kFloat16:
      return run(sample<Float16>);
  }
}

}  // namespace pygpt
