// What the kernels share: 16-bit tiles in shared memory and products of them, visible key ranges,
// dropout words, reductions over a warp.
#pragma once

#include "core/philox.h"
#include "cuda/cuda.h"
#include "cuda/ptx.cuh"

namespace pygpt {

constexpr int kWarp = 32;
constexpr float kLog2E = 1.4426950408889634f;

template <class T>
PYGPT_HOST_DEVICE T least(T a, T b) {
  return a < b ? a : b;
}
template <class T>
PYGPT_HOST_DEVICE T greatest(T a, T b) {
  return a > b ? a : b;
}

// --- which keys a query sees ---------------------------------------------------------------

// One row of a batch. Both bounds never decrease with the query, which is why tiles can be skipped
// and masked by looking at their corners.
struct Sequence {
  int32_t queries, keys, window;
  const int32_t* starts;

  PYGPT_HOST_DEVICE Sequence(const CudaAttention& a, int batch)
      : queries(a.queries),
        keys(a.kv_lengths ? least(a.kv_lengths[batch], a.keys) : a.keys),
        window(a.window),
        starts(a.document_starts ? a.document_starts + static_cast<int64_t>(batch) * a.keys
                                 : nullptr) {}

  PYGPT_HOST_DEVICE int last_key(int query) const { return keys - queries + query; }
  PYGPT_HOST_DEVICE int first_key(int query) const {
    const int position = last_key(query);
    int first = window ? greatest(position - window + 1, 0) : 0;
    if (starts && position >= 0) first = greatest(first, starts[position]);
    return first;
  }
  // The queries that see any of the keys [first, last]: from here ...
  PYGPT_HOST_DEVICE int first_query(int first) const {
    return greatest(first - (keys - queries), 0);
  }
  // ... to before here.
  PYGPT_HOST_DEVICE int end_query(int last) const {
    int low = greatest(least(last, keys), 0), high = keys;
    if (window) high = least(high, last + window);
    while (starts && low < high) {  // the first position whose document starts after `last`
      const int middle = (low + high) / 2;
      if (starts[middle] > last) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    return greatest(high - (keys - queries), 0);
  }
  // Whether all of queries [q, q + n_queries) see all of keys [k, k + n_keys).
  PYGPT_HOST_DEVICE bool all_visible(int q, int n_queries, int k, int n_keys) const {
    return q + n_queries <= queries && k + n_keys - 1 <= last_key(q) &&
           k >= first_key(q + n_queries - 1);
  }
};

// --- tiles -----------------------------------------------------------------------------------

// Byte offset of a 16-byte chunk (8 elements) of a tile with kD elements a row. Chunks are swizzled
// so that the same chunk of 8 neighbouring rows lies in 8 different groups of banks.
template <int kD>
PYGPT_HOST_DEVICE uint32_t tile_offset(int row, int chunk) {
  return static_cast<uint32_t>(row * (kD / 8) + (chunk ^ (row & 7))) * 16;
}
// From the offset of chunk 0 or 1 of a row to that of the chunk `chunks` (even) further right.
PYGPT_HOST_DEVICE uint32_t step_right(uint32_t offset, int chunks) {
  return (offset ^ (chunks & 7) * 16) + (chunks & ~7) * 16;
}

template <class T>
PYGPT_HOST_DEVICE T* head_of(const CudaTensor& x, int batch, int head) {
  return static_cast<T*>(x.data) + batch * x.batch + head * x.head;
}

// Rows [first, first + kRows) of one head into a tile; rows at or past `end` and the channels past
// `channels` are zeros.
template <int kRows, int kD, int kThreads, class T>
__device__ __forceinline__ void load_tile(uint32_t tile, const T* head, int64_t stride, int first,
                                          int end, int channels, int thread) {
  constexpr int kChunks = kD / 8, kStep = kThreads / kChunks;
  static_assert(kThreads % kChunks == 0 && kRows % kStep == 0);
  const int row = thread / kChunks, chunk = thread % kChunks;
  const T* from = head + opaque(first + row) * stride + chunk * 8;
  const int rows = chunk * 8 < channels ? end - first - row : 0;
#pragma unroll
  for (int i = 0; i < kRows; i += kStep, from += kStep * stride) {
    copy16(tile + tile_offset<kD>(row + i % 8, chunk) + i / 8 * 8 * kD * 2, from, i < rows);
  }
}

// Accumulators of kM x 16 rows, times `factor`, through the warp's own rows of a tile (which starts
// at `memory`) to rows [first, first + kM * 16) of one head, those before `end`.
template <class T, int kM, int kD>
__device__ __forceinline__ void store_tile(char* memory, int tile_row,
                                           const float (&c)[kM][kD / 8][4],
                                           const float (&factor)[kM][2], T* head, int64_t stride,
                                           int first, int end, int channels) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < kD / 8; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = tile_row + m * 16 + half * 8 + lane / 4;
        const uint32_t word =
            pack<T>(c[m][n][2 * half] * factor[m][half], c[m][n][2 * half + 1] * factor[m][half]);
        *reinterpret_cast<uint32_t*>(memory + tile_offset<kD>(row, n) + lane % 4 * 4) = word;
      }
    }
  }
  warp_barrier();
  constexpr int kChunks = kD / 8;
#pragma unroll
  for (int i = 0; i < kM * 16 * kChunks / kWarp; ++i) {
    const int row = (i * kWarp + lane) / kChunks, chunk = (i * kWarp + lane) % kChunks;
    if (first + row < end && chunk * 8 < channels) {
      *reinterpret_cast<uint4*>(head + (first + row) * stride + chunk * 8) =
          *reinterpret_cast<const uint4*>(memory + tile_offset<kD>(tile_row + row, chunk));
    }
  }
}

// c += A B^T: kM * 16 rows of tile A from a_row on, kN * 8 rows of tile B from b_row on.
template <class T, int kD, int kM, int kN>
__device__ __forceinline__ void multiply_transposed(float (&c)[kM][kN][4], uint32_t a_tile,
                                                    int a_row, uint32_t b_tile, int b_row) {
  const int lane = threadIdx.x % kWarp;
  const uint32_t a_start = opaque(a_tile + tile_offset<kD>(a_row + lane % 16, lane / 16));
  const uint32_t b_start =
      opaque(b_tile + tile_offset<kD>(b_row + lane % 8 + lane / 16 * 8, lane / 8 % 2));
#pragma unroll
  for (int k = 0; k < kD / 16; ++k) {
    uint32_t a[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      load_matrices(a[m], step_right(a_start, 2 * k) + m * 16 * kD * 2);
    }
#pragma unroll
    for (int n = 0; n < kN / 2; ++n) {
      uint32_t b[4];
      load_matrices(b, step_right(b_start, 2 * k) + n * 16 * kD * 2);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        mma<T>(c[m][2 * n], a[m], b[0], b[1]);
        mma<T>(c[m][2 * n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// c += P B: P (kM * 16 x kN * 8) as accumulators hold it, rounded to T; B the kN * 8 rows of a tile
// from b_row on.
template <class T, int kD, int kM, int kN>
__device__ __forceinline__ void multiply(float (&c)[kM][kD / 8][4], const float (&p)[kM][kN][4],
                                         uint32_t b_tile, int b_row) {
  const int lane = threadIdx.x % kWarp;
  const uint32_t start = opaque(b_tile + tile_offset<kD>(b_row + lane % 16, lane / 16));
#pragma unroll
  for (int k = 0; k < kN / 2; ++k) {
    uint32_t a[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* pair = &p[m][2 * k + i / 2][i % 2 * 2];
        a[m][i] = pack<T>(pair[0], pair[1]);
      }
    }
#pragma unroll
    for (int n = 0; n < kD / 16; ++n) {
      uint32_t b[4];
      load_matrices_transposed(b, step_right(start, 2 * n) + k * 16 * kD * 2);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        mma<T>(c[m][2 * n], a[m], b[0], b[1]);
        mma<T>(c[m][2 * n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

template <int kM, int kN>
__device__ __forceinline__ void clear(float (&c)[kM][kN][4]) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) c[m][n][i] = 0.0f;
    }
  }
}

// -infinity to the scores of pairs that do not see each other. Rows are queries, columns keys.
template <int kM, int kN>
__device__ __forceinline__ void mask(float (&scores)[kM][kN][4], const Sequence& sequence,
                                     int query, int key) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = query + m * 16 + half * 8 + lane / 4;
      const bool exists = row < sequence.queries;
      const int first = (exists ? sequence.first_key(row) : 0) - key - lane % 4 * 2;
      const int last = (exists ? sequence.last_key(row) : -1) - key - lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (n * 8 + i < first || n * 8 + i > last) scores[m][n][half * 2 + i] = -INFINITY;
        }
      }
    }
  }
}
// The same where rows are keys and columns queries.
template <int kN>
__device__ __forceinline__ void mask_transposed(float (&scores)[1][kN][4], const Sequence& sequence,
                                                int query, int key) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int n = 0; n < kN; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int column = query + n * 8 + lane % 4 * 2 + i;
      const bool exists = column < sequence.queries;
      const int first = (exists ? sequence.first_key(column) : 0) - key - lane / 4;
      const int last = (exists ? sequence.last_key(column) : -1) - key - lane / 4;
      if (0 < first || 0 > last) scores[0][n][i] = -INFINITY;
      if (8 < first || 8 > last) scores[0][n][2 + i] = -INFINITY;
    }
  }
}

// Blocks of 128 queries read the keys less often than those of 64, which are better where there is
// too little to fill the multiprocessors twice.
inline bool tall_blocks_fill(const CudaAttention& a, const CudaLaunch& launch) {
  const int64_t blocks = static_cast<int64_t>(a.batches) * a.heads * ((a.queries + 127) / 128);
  return blocks >= 2 * multiprocessors(launch.device);
}

// --- dropout ---------------------------------------------------------------------------------

struct Dropout {
  uint64_t seed;
  uint32_t threshold, batch, head;
  float scale;  // of the weights that stay

  __device__ Dropout(const CudaAttention& a, int b, int h)
      : seed(static_cast<uint64_t>(*a.seed)),
        threshold(a.dropout_threshold),
        batch(b),
        head(h),
        scale(a.kept_scale) {}

  __device__ Philox words(int query, int key) const {
    return philox(seed, batch, head, query, static_cast<uint32_t>(key) / 4);
  }

  // Which of the accumulators c[0..3] of a 16 x 8 tile stay, as bits 0..3: queries are its rows,
  // the first (query, key) given. Four keys share one Philox call and two lanes, which make one
  // call each, the even one for row g and the odd one for row g + 8, and exchange halves.
  __device__ uint32_t kept(int query, int key) const {
    const int lane = threadIdx.x % kWarp;
    const bool odd = lane % 2;
    const Philox mine = words(query + lane / 4 + (odd ? 8 : 0), key + lane % 4 * 2);
    const uint32_t other0 = shuffle_xor(odd ? mine.words[0] : mine.words[2], 1);
    const uint32_t other1 = shuffle_xor(odd ? mine.words[1] : mine.words[3], 1);
    const uint32_t w0 = odd ? other0 : mine.words[0], w1 = odd ? other1 : mine.words[1];
    const uint32_t w2 = odd ? mine.words[2] : other0, w3 = odd ? mine.words[3] : other1;
    return (w0 >= threshold) | (w1 >= threshold) << 1 | (w2 >= threshold) << 2 |
           (w3 >= threshold) << 3;
  }

  // The same for a transposed tile: its rows are keys, its columns queries. Lanes of the same
  // queries and the same four keys make one of the four calls that all of them need, and exchange
  // words.
  __device__ uint32_t kept_transposed(int query, int key) const {
    const int lane = threadIdx.x % kWarp;
    const int mine = lane / 4 % 4;  // which call this lane makes, and which word of each it needs
    const Philox call =
        words(query + lane % 4 * 2 + mine % 2, key + lane / 4 + (mine >= 2 ? 8 : 0));
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int wanted = mine ^ i;  // the word that the lane which is to get it needs
      const uint32_t word = wanted < 2 ? (wanted ? call.words[1] : call.words[0])
                                       : (wanted == 2 ? call.words[2] : call.words[3]);
      bits |= static_cast<uint32_t>(shuffle_xor(word, i * 4) >= threshold) << wanted;
    }
    return bits;
  }
};

// --- reductions and dispatch -------------------------------------------------------------------

// Over the four lanes that hold one row of an accumulator.
__device__ __forceinline__ float quad_sum(float x) {
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}
__device__ __forceinline__ float quad_max(float x) {
  x = greatest(x, shuffle_xor(x, 1));
  return greatest(x, shuffle_xor(x, 2));
}

template <class T, class Combine>
__device__ __forceinline__ T warp_reduce(T x, Combine combine) {
#pragma unroll
  for (int mask = kWarp / 2; mask; mask /= 2) x = combine(x, shuffle_xor(x, mask));
  return x;
}

}  // namespace pygpt
