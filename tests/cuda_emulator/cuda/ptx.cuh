// csrc/cuda/ptx.cuh for a CPU: every thread of a block is a coroutine, blocks run one after
// another.
//
// Warp instructions (mma, ldmatrix, shuffles) wait until all 32 lanes have come and then act on all
// of them, by the layouts of the PTX ISA. Shared memory starts as NaNs. Order says which thread
// runs when and when asynchronous copies land: a missing barrier or wait shows as a result that
// depends on it. Addresses are checked: alignment, bounds, and that ldmatrix meets no bank
// conflict.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <type_traits>
#include <vector>

#include "core/error.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define __grid_constant__

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace pygpt {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

namespace emulated {

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulated block (%u, %u), thread %u: %s\n", blockIdx.x, blockIdx.y,
               threadIdx.x, what);
  std::abort();
}
inline void require(bool good, const char* what) {
  if (!good) fail(what);
}

constexpr size_t kStack = 64 * 1024, kSharedLimit = 227 * 1024;
alignas(1024) inline char memory[kSharedLimit];
inline size_t memory_bytes = 0;
// All warps side by side and copies as late as possible, or each warp as far ahead of the others as
// barriers let it and copies at once: between them, what a missing barrier spoils shows.
enum class Order { kTogether, kFirstWarpFirst, kLastWarpFirst };
inline Order order = Order::kTogether;

struct Copy {
  uint32_t to;
  char bytes[16];
  int size;
};
struct Thread {
  std::unique_ptr<char[]> stack{new char[kStack]};
  ucontext_t start;
  jmp_buf resume;
  bool started, done, waiting;
  std::vector<std::vector<Copy>> groups;  // committed, oldest first
  std::vector<Copy> open;
  const void* input;
  void* output;
};
inline std::vector<Thread> threads;
inline unsigned current = 0, n_threads = 0;
inline jmp_buf scheduler;
inline const std::function<void()>* body = nullptr;

inline void yield() {
  Thread& t = threads[current];
  if (!_setjmp(t.resume)) _longjmp(scheduler, 1);
}

// Waits until every live thread of [first, first + count) is here; the last one acts for all.
template <class Act>
void meet(unsigned first, unsigned count, const void* input, void* output, const Act& act) {
  Thread& me = threads[current];
  me.input = input;
  me.output = output;
  me.waiting = true;
  for (unsigned i = first; i < first + count; ++i) {
    if (!threads[i].done && !threads[i].waiting) return yield();
  }
  act();
  for (unsigned i = first; i < first + count; ++i) threads[i].waiting = false;
}
template <class In, class Out, class Act>
void warp(const In& input, Out& output, const Act& act) {
  const unsigned first = current / 32 * 32;
  meet(first, 32, &input, &output, [&] {
    const In* in[32];
    Out* out[32];
    for (int i = 0; i < 32; ++i) {
      require(!threads[first + i].done, "a lane has left the warp");
      in[i] = static_cast<const In*>(threads[first + i].input);
      out[i] = static_cast<Out*>(threads[first + i].output);
    }
    act(in, out);
  });
}

inline void entry() {
  (*body)();
  threads[current].done = true;
  require(threads[current].open.empty() && threads[current].groups.empty(),
          "a thread ended before its copies were waited for");
  _longjmp(scheduler, 1);
}

// Runs one thread until it waits, ends, or yields. Apart, so that no local outlives a longjmp.
[[gnu::noinline]] inline void resume(unsigned i) {
  current = i;
  threadIdx = dim3(i);
  Thread& t = threads[i];
  if (_setjmp(scheduler)) return;
  if (t.started) _longjmp(t.resume, 1);
  t.started = true;
  getcontext(&t.start);
  t.start.uc_stack.ss_sp = t.stack.get();
  t.start.uc_stack.ss_size = kStack;
  makecontext(&t.start, entry, 0);
  setcontext(&t.start);
}

inline void run_block(const std::function<void()>& run) {
  body = &run;
  std::memset(memory, 0xff, sizeof(memory));  // NaNs
  for (unsigned i = 0; i < n_threads; ++i) {
    Thread& t = threads[i];
    t.started = t.done = t.waiting = false;
    t.groups.clear();
    t.open.clear();
  }
  const unsigned warps = (n_threads + 31) / 32;
  for (bool any = true; any;) {
    any = false;
    bool moved = false;
    for (unsigned w = 0; w < warps; ++w) {
      const unsigned first = (order == Order::kLastWarpFirst ? warps - 1 - w : w) * 32;
      for (unsigned i = first; i < std::min(first + 32, n_threads); ++i) {
        if (threads[i].done) continue;
        any = true;
        if (threads[i].waiting) continue;
        moved = true;
        resume(i);
      }
      if (moved && order != Order::kTogether) break;  // the same warp again, as far as it gets
    }
    require(!any || moved, "threads wait for each other for ever");
  }
}

inline void land(Thread& t, size_t pending) {
  while (t.groups.size() > pending) {
    for (const Copy& c : t.groups.front()) std::memcpy(memory + c.to, c.bytes, c.size);
    t.groups.erase(t.groups.begin());
  }
}

inline void copy(uint32_t to, const void* from, bool valid, int size) {
  require(to % size == 0 && to + size <= memory_bytes, "copy outside shared memory");
  Copy c{to, {}, size};
  if (valid) {
    require(reinterpret_cast<uintptr_t>(from) % size == 0, "copy from an unaligned address");
    std::memcpy(c.bytes, from, size);
  }
  if (order == Order::kTogether) {
    threads[current].open.push_back(c);
  } else {
    std::memcpy(memory + to, c.bytes, size);
  }
}

inline void load_matrices(uint32_t (&r)[4], uint32_t address, bool transposed) {
  warp(address, r, [&](const uint32_t* const* in, uint32_t (*const* out)[4]) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      uint16_t x[8][8];
      unsigned groups = 0;
      for (int row = 0; row < 8; ++row) {
        const uint32_t a = *in[matrix * 8 + row];
        require(a % 16 == 0 && a + 16 <= memory_bytes, "ldmatrix outside shared memory");
        groups |= 1u << a / 16 % 8;
        std::memcpy(x[row], memory + a, 16);
      }
      require(groups == 255, "ldmatrix with bank conflicts");
      for (int lane = 0; lane < 32; ++lane) {
        const int g = lane / 4, t = lane % 4 * 2;
        const uint16_t low = transposed ? x[t][g] : x[g][t];
        const uint16_t high = transposed ? x[t + 1][g] : x[g][t + 1];
        (*out[lane])[matrix] = low | static_cast<uint32_t>(high) << 16;
      }
    }
  });
}

}  // namespace emulated

inline char* shared_memory() { return emulated::memory; }
inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(static_cast<const char*>(p) - emulated::memory);
}
template <class T>
T opaque(T x) {
  return x;
}

inline void copy16(uint32_t to, const void* from, bool valid) {
  emulated::copy(to, from, valid, 16);
}
inline void copy4(uint32_t to, const void* from, bool valid) { emulated::copy(to, from, valid, 4); }
inline void copy_commit() {
  emulated::Thread& t = emulated::threads[emulated::current];
  t.groups.push_back(std::move(t.open));
  t.open.clear();
}
template <int kPending>
void copy_wait() {
  emulated::land(emulated::threads[emulated::current], kPending);
}

inline void load_matrices(uint32_t (&r)[4], uint32_t address) {
  emulated::load_matrices(r, address, false);
}
inline void load_matrices_transposed(uint32_t (&r)[4], uint32_t address) {
  emulated::load_matrices(r, address, true);
}

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}
inline float to_float(Float16 x) {
  _Float16 y;
  std::memcpy(&y, &x, 2);
  return static_cast<float>(y);
}
template <class T>
T from_float(float x) {
  T y;
  if constexpr (std::is_same_v<T, float>) {
    y = x;
  } else if constexpr (std::is_same_v<T, Float16>) {
    const auto rounded = static_cast<_Float16>(x);
    std::memcpy(&y, &rounded, 2);
  } else {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    y.bits = static_cast<uint16_t>(x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
  return y;
}
template <class T>
uint32_t pack(float low, float high) {
  return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}

template <class T>
void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Operands {
    uint32_t a[4], b[2];
  } const mine{{a[0], a[1], a[2], a[3]}, {b0, b1}};
  emulated::warp(mine, c, [](const Operands* const* in, float (*const* out)[4]) {
    const auto half = [](uint32_t word, int i) {
      const T x{static_cast<uint16_t>(word >> 16 * i)};
      return to_float(x);
    };
    float left[16][16], right[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4 * 2;
      for (int i = 0; i < 2; ++i) {
        left[g][t + i] = half(in[lane]->a[0], i);
        left[g + 8][t + i] = half(in[lane]->a[1], i);
        left[g][t + 8 + i] = half(in[lane]->a[2], i);
        left[g + 8][t + 8 + i] = half(in[lane]->a[3], i);
        right[t + i][g] = half(in[lane]->b[0], i);
        right[t + 8 + i][g] = half(in[lane]->b[1], i);
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        float sum = (*out[lane])[i];
        for (int k = 0; k < 16; ++k) sum += left[row][k] * right[k][column];
        (*out[lane])[i] = sum;
      }
    }
  });
}

inline float fast_exp2(float x) { return std::exp2(x); }
inline int32_t float_bits(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float bits_float(int32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline float multiply(float x, float y) { return x * y; }  // the build says -ffp-contract=off
inline float add(float x, float y) { return x + y; }
inline float divide(float x, float y) { return x / y; }

template <class T>
T shuffle(T x, int lane) {
  struct In {
    T x;
    int lane;
  } const in{x, lane};
  T out{};
  emulated::warp(in, out, [](const In* const* all, T* const* results) {
    for (int i = 0; i < 32; ++i) *results[i] = all[all[i]->lane & 31]->x;
  });
  return out;
}
template <class T>
T shuffle_xor(T x, int mask) {
  return shuffle(x, static_cast<int>(emulated::current % 32) ^ mask);
}
template <class T>
T shuffle_up(T x, int delta) {
  const int lane = static_cast<int>(emulated::current % 32);
  return shuffle(x, lane < delta ? lane : lane - delta);
}
inline uint32_t ballot(bool x) {
  uint32_t bits = 0;
  emulated::warp(x, bits, [](const bool* const* in, uint32_t* const* out) {
    uint32_t all = 0;
    for (int i = 0; i < 32; ++i) all |= static_cast<uint32_t>(*in[i]) << i;
    for (int i = 0; i < 32; ++i) *out[i] = all;
  });
  return bits;
}
inline int popcount(uint32_t x) { return __builtin_popcount(x); }
inline void warp_barrier() {
  int nothing = 0;
  emulated::warp(nothing, nothing, [](const auto*, const auto*) {});
}
inline void barrier() {
  emulated::meet(0, emulated::n_threads, nullptr, nullptr, [] {});
}

// Coroutines of one thread: a read-modify-write is never interrupted.
template <class T>
T atomicAdd(T* p, T x) {
  const T old = *p;
  *p += x;
  return old;
}

inline int multiprocessors(int) { return 1; }  // so that two blocks are enough for tall tiles

template <class... Parameters>
void launch_kernel(void (*kernel)(Parameters...), dim3 grid, int threads, int shared_bytes, int,
                   void*, const std::decay_t<Parameters>&... arguments) {
  emulated::require(shared_bytes <= 99 * 1024, "more shared memory than consumer chips have");
  emulated::memory_bytes = shared_bytes;
  emulated::n_threads = threads;
  if (emulated::threads.size() < static_cast<size_t>(threads)) emulated::threads.resize(threads);
  gridDim = grid;
  blockDim = dim3(threads);
  const std::function<void()> run = [&] { kernel(arguments...); };
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) {
      blockIdx = dim3(x, y);
      emulated::run_block(run);
    }
  }
}

}  // namespace pygpt
