// One token per row of logits, as csrc/cpu/sample.cpp defines it, bit for bit: integer weights,
// whose sums do not depend on their order. A block per row; thresholds by radix selection over the
// keys' bits in three passes, then indices by prefix sums that narrow to a warp's share. What top-k
// leaves goes to shared memory, if it is little. No sort, no wait for the host.
#include "cuda/common.cuh"

namespace pygpt {
namespace {

constexpr int kThreads = 1024, kWarps = kThreads / kWarp, kBins = 2048, kFew = 1024;
constexpr int32_t kPositiveInfinity = 0x7f800000;
constexpr int32_t kNegativeInfinity = static_cast<int32_t>(0xff800000) ^ 0x7fffffff;
static_assert(kWarps == kWarp);  // a lane for each warp's sum

struct Shared {
  uint32_t low[kBins], high[kBins];  // of 64-bit sums: native additions have 32 bits
  int32_t keys[kFew], indices[kFew];
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

// Every warp's x, which its lanes agree on: lane i of each warp gets warp i's.
__device__ __forceinline__ int64_t exchange(int64_t x, Shared& shared) {
  barrier();
  if (threadIdx.x % kWarp == 0) shared.warps[threadIdx.x / kWarp] = x;
  barrier();
  return shared.warps[threadIdx.x % kWarp];
}
template <class T, class Combine>
__device__ T block_reduce(T x, Shared& shared, Combine combine) {
  return warp_reduce(static_cast<T>(exchange(warp_reduce(x, combine), shared)), combine);
}

__device__ __forceinline__ int64_t warp_inclusive_sum(int64_t x) {
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const int64_t left = shuffle_up(x, step);
    if (threadIdx.x % kWarp >= step) x += left;
  }
  return x;
}
// The sum of the x of the warps before this one.
__device__ __forceinline__ int64_t sum_before(int64_t x, Shared& shared) {
  const int64_t all = exchange(x, shared);
  return shuffle(warp_inclusive_sum(all) - all, threadIdx.x / kWarp);
}
__device__ __forceinline__ int64_t warp_sum(int64_t x) {
  return warp_reduce(x, [](int64_t a, int64_t b) { return a + b; });
}

// The key at which the mass of keys, taken from the greatest down, first reaches `need`, and the
// mass of the keys above it. Counts need no high words.
struct Cut {
  int32_t key;
  int64_t above;
};
template <bool kCounts, class Mass>
__device__ Cut select(const int32_t* keys, int n, int64_t need, Shared& shared, const Mass& mass) {
  uint32_t prefix = 0;  // the digits found so far, of keys shifted to unsigned order
  int64_t above = 0;
  for (int shift = 21; shift >= -1; shift -= 11) {  // digits: bits 31-21, 20-10, 9-0
    const int digit = greatest(shift, 0), width = shift < 0 ? 10 : 11;
    barrier();
    for (int b = threadIdx.x; b < kBins; b += kThreads) shared.low[b] = shared.high[b] = 0;
    barrier();
#pragma unroll 4
    for (int i = threadIdx.x; i < n; i += kThreads) {
      const uint32_t key = static_cast<uint32_t>(keys[i]) ^ 0x80000000u;
      if (digit + width < 32 && key >> (digit + width) != prefix) continue;
      const uint32_t bin = key >> digit & ((1u << width) - 1);
      const int64_t m = mass(i, keys[i]);
      if (m == 0) continue;
      const auto low = static_cast<uint32_t>(m);
      const uint32_t before = atomicAdd(&shared.low[bin], low);
      if constexpr (!kCounts) {
        const uint32_t high = static_cast<uint32_t>(m >> 32) + (before + low < low);
        if (high) atomicAdd(&shared.high[bin], high);
      }
    }
    barrier();
    const auto sum_of = [&](int b) {
      return static_cast<int64_t>(static_cast<uint64_t>(shared.high[b]) << 32 | shared.low[b]);
    };
    // Each thread looks at kBins / kThreads neighbouring bins, counted from the greatest.
    constexpr int kMine = kBins / kThreads;
    const int top = (1 << width) - 1 - kMine * static_cast<int>(threadIdx.x);
    int64_t mine = 0;
    for (int b = top; b > top - kMine && b >= 0; --b) mine += sum_of(b);
    const int64_t running = warp_inclusive_sum(mine);
    int64_t before = above + running - mine + sum_before(shuffle(running, kWarp - 1), shared);
    if (before < need && need <= before + mine) {  // exactly one thread
      int b = top;
      while (before + sum_of(b) < need) before += sum_of(b--);
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
  int begin = 0, end = n;
  int64_t rest = -1;
  for (int chunk = kThreads; chunk > kWarp;) {
    chunk = (end - begin + kThreads - 1) / kThreads * kWarp;  // a warp's, whole rows of lanes
    const int first = begin + warp * chunk, last = least(first + chunk, end);
    int64_t sum = 0;
#pragma unroll 4
    for (int i = first + lane; i < last; i += kWarp) sum += mass(i, keys[i]);
    const int64_t all = exchange(warp_sum(sum), shared), running = warp_inclusive_sum(all);
    if (rest < 0) rest = rest_of(shuffle(running, kWarp - 1));
    const int owner = least(popcount(ballot(running <= rest)), kWarps - 1);
    rest -= shuffle(running - all, owner);
    begin += owner * chunk;
    end = least(begin + chunk, end);
  }
  const int i = begin + lane;
  const int64_t running = warp_inclusive_sum(i < end ? static_cast<int64_t>(mass(i, keys[i])) : 0);
  return begin + popcount(ballot(running <= rest));
}

// The keys above `cut` and the first `ties` of those equal to it, in the order of their indices, to
// shared memory.
__device__ void collect(const int32_t* keys, int n, int32_t cut, int64_t ties, Shared& shared) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int chunk = (n + kThreads - 1) / kThreads * kWarp;
  const int begin = warp * chunk, end = least(begin + chunk, n);
  int64_t both = 0;  // how many are above, and in the high word how many are equal
#pragma unroll 4
  for (int i = begin + lane; i < end; i += kWarp) {
    both += (keys[i] > cut) + (static_cast<int64_t>(keys[i] == cut) << 32);
  }
  both = sum_before(warp_sum(both), shared);
  int equals = static_cast<int>(both >> 32);
  int place = static_cast<int>(both & 0xffffffff) + least(equals, static_cast<int>(ties));
  const uint32_t left = (1u << lane) - 1;  // the lanes before this one
#pragma unroll 4
  for (int row = begin; row < end; row += kWarp) {
    const int i = row + lane;
    const int32_t key = i < end ? keys[i] : 0;
    const bool equal = i < end && key == cut;
    const uint32_t equal_lanes = ballot(equal);
    const bool stays =
        (i < end && key > cut) || (equal && equals + popcount(equal_lanes & left) < ties);
    const uint32_t staying = ballot(stays);
    if (stays) {
      shared.keys[place + popcount(staying & left)] = key;
      shared.indices[place + popcount(staying & left)] = i;
    }
    equals += popcount(equal_lanes);
    place += popcount(staying);
  }
  barrier();
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    sample(const SampleArgs a, const __grid_constant__ SampleParameters common, int32_t* all_keys) {
  Shared& shared = *reinterpret_cast<Shared*>(shared_memory());
  const int64_t row = blockIdx.x;
  int n = static_cast<int>(a.vocab);
  const SampleParameters& p =  // read where it is used
      a.parameters ? a.parameters[row * a.parameters_stride] : common;
  int32_t* const all = all_keys + row * a.vocab;
  const int32_t* keys = all;  // those in the race
  const T* logits = static_cast<const T*>(a.logits) + row * a.logits_stride;
  int32_t high = kNegativeInfinity, low = kPositiveInfinity;
  const auto widen = [&](int32_t key) {
    high = greatest(high, key);
    low = least(low, key);
  };
#pragma unroll 4
  for (int i = threadIdx.x; i < n; i += kThreads) {
    const float x = to_float(logits[i]);
    const int32_t key = key_of(a.bias ? add(x, a.bias[row * a.bias_stride + i]) : x);
    all[i] = key;
    widen(key);
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
      const float z = bits_float(ordered(all[token]));
      const auto repetition = static_cast<float>(p.repetition_penalty);
      const float penalty =
          add(static_cast<float>(p.presence_penalty),
              multiply(static_cast<float>(p.frequency_penalty), static_cast<float>(count)));
      all[token] =
          key_of(add(z > 0.0f ? divide(z, repetition) : multiply(z, repetition), -penalty));
    }
    barrier();
    high = kNegativeInfinity, low = kPositiveInfinity;
#pragma unroll 4
    for (int i = threadIdx.x; i < n; i += kThreads) widen(all[i]);
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
      const Cut found = select<true>(keys, n, k, shared, [](int, int32_t) { return 1; });
      if (k <= kFew) {
        collect(keys, n, found.key, k - found.above, shared);
        keys = shared.keys;
        n = tie_end = static_cast<int>(k);
      } else {
        cut = found.key;
        tie_end = 1 + locate(
                          keys, n, shared, [=](int, int32_t key) { return key == cut; },
                          [=](int64_t) { return k - found.above - 1; });
      }
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
      const Cut found = select<false>(keys, n, need, shared, weight);
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
  if (threadIdx.x == 0) a.tokens[row] = keys == all || token < 0 ? token : shared.indices[token];
}

}  // namespace

void cuda_sample(const SampleArgs& a, const SampleParameters& common, int32_t* keys,
                 const CudaLaunch& launch) {
  const auto run = [&](auto kernel) {
    launch_kernel(kernel, dim3(a.rows), kThreads, sizeof(Shared), launch.device, launch.stream, a,
                  common, keys);
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
