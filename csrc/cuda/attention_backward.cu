// The gradient of causal attention, 16-bit types, for sm_80 and later, in three kernels. Scores are
// computed twice, once by rows for dq and once by columns for dk and dv: 7 products where one pass
// with atomic additions to dq needs 5, but every element of every gradient has one writer, so the
// result is the same bits each time, and probabilities never leave registers.
#include "cuda/common.cuh"

namespace pygpt {
namespace {

// delta[i] = sum over channels of dout[i] * out[i]; a lane has 16 bytes of a row, all types.
template <class T, int kD>
__global__ void __launch_bounds__(256)
    attention_delta(const CudaAttention a, const CudaAttentionGradient g) {
  constexpr int kWide = 16 / sizeof(T), kLanes = kD / kWide;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (256 / kLanes) + threadIdx.x / kLanes;
  const bool exists = row < static_cast<int64_t>(a.batches) * a.heads * a.queries;
  const int d = threadIdx.x % kLanes * kWide;
  float sum = 0.0f;
  if (exists && d < a.channels) {
    const int query = row % a.queries, head = row / a.queries % a.heads;
    const int batch = row / a.queries / a.heads;
    union {
      uint4 word;
      T elements[kWide];
    } out, dout;
    out.word = *reinterpret_cast<const uint4*>(head_of<const T>(a.out, batch, head) +
                                               query * a.out.token + d);
    dout.word = *reinterpret_cast<const uint4*>(head_of<const T>(g.dout, batch, head) +
                                                query * g.dout.token + d);
#pragma unroll
    for (int i = 0; i < kWide; ++i) sum += to_float(out.elements[i]) * to_float(dout.elements[i]);
  }
#pragma unroll
  for (int mask = kLanes / 2; mask; mask /= 2) sum += shuffle_xor(sum, mask);
  if (exists && d == 0) g.delta[row] = sum;
}

// dq: a block of 4 warps owns kRows queries and walks over their keys, as the forward does.
template <int kD, int kM, int kKeys>
constexpr int dq_bytes() {
  return (2 * 4 * kM * 16 + 4 * kKeys) * kD * 2;
}

template <class T, int kD, int kM, int kKeys, bool kDropout>
__global__ void __launch_bounds__(128, 2)
    attention_dq(const CudaAttention a, const CudaAttentionGradient g) {
  constexpr int kRows = 4 * kM * 16, kN = kKeys / 8, kThreads = 128;
  const int batch = blockIdx.x / a.heads, head = blockIdx.x % a.heads;
  const int first_query = (gridDim.y - 1 - blockIdx.y) * kRows;
  const int thread = threadIdx.x, warp = thread / kWarp, lane = thread % kWarp;
  const int warp_query = first_query + warp * kM * 16;
  const Sequence sequence(a, batch);
  const int end_key = sequence.last_key(least(first_query + kRows, a.queries) - 1) + 1;
  const int first_key = sequence.first_key(first_query) / kKeys * kKeys;
  const T* k = head_of<const T>(a.k, batch, head / (a.heads / a.kv_heads));
  const T* v = head_of<const T>(a.v, batch, head / (a.heads / a.kv_heads));

  char* memory = shared_memory();
  const uint32_t q_tile = shared_address(memory), dout_tile = q_tile + kRows * kD * 2;
  const uint32_t kv_tiles = dout_tile + kRows * kD * 2;  // two pairs of keys and values
  constexpr uint32_t kTile = kKeys * kD * 2;
  const auto load_keys = [&](int key, int stage) {
    const uint32_t tile = kv_tiles + stage * 2 * kTile;
    load_tile<kKeys, kD, kThreads>(tile, k, a.k.token, key, sequence.keys, a.channels, thread);
    load_tile<kKeys, kD, kThreads>(tile + kTile, v, a.v.token, key, sequence.keys, a.channels,
                                   thread);
  };

  const float scale = a.scale * kLog2E;
  float dq[kM][kD / 8][4], lse[kM][2], delta[kM][2];
  clear(dq);
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int query = warp_query + m * 16 + half * 8 + lane / 4;
      const int64_t row = (static_cast<int64_t>(batch) * a.heads + head) * a.queries + query;
      lse[m][half] = query < a.queries ? a.lse[row] : 0.0f;
      delta[m][half] = query < a.queries ? g.delta[row] : 0.0f;
    }
  }
  load_tile<kRows, kD, kThreads>(q_tile, head_of<const T>(a.q, batch, head), a.q.token, first_query,
                                 a.queries, a.channels, thread);
  load_tile<kRows, kD, kThreads>(dout_tile, head_of<const T>(g.dout, batch, head), g.dout.token,
                                 first_query, a.queries, a.channels, thread);
  load_keys(first_key, 0);
  copy_commit();
  for (int key = first_key, stage = 0; key < end_key; key += kKeys, stage ^= 1) {
    if (key + kKeys < end_key) load_keys(key + kKeys, stage ^ 1);
    copy_commit();
    copy_wait<1>();
    barrier();
    const uint32_t k_tile = kv_tiles + stage * 2 * kTile;
    float p[kM][kN][4], dp[kM][kN][4];
    clear(p);
    multiply_transposed<T, kD>(p, q_tile, warp * kM * 16, k_tile, 0);
    clear(dp);
    multiply_transposed<T, kD>(dp, dout_tile, warp * kM * 16, k_tile + kTile, 0);
    if (!sequence.all_visible(warp_query, kM * 16, key, kKeys)) {
      mask(p, sequence, warp_query, key);
    }
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        if constexpr (kDropout) {
          const Dropout dropout(a, batch, head);
          const uint32_t kept = dropout.kept(warp_query + m * 16, key + n * 8);
#pragma unroll
          for (int i = 0; i < 4; ++i) dp[m][n][i] = kept >> i & 1 ? dp[m][n][i] * dropout.scale : 0;
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          // forward: p = exp2(score * scale - lse); out = sum_j p_j kept_j v_j
          p[m][n][i] = fast_exp2(fmaf(p[m][n][i], scale, -lse[m][i / 2]));
          p[m][n][i] *= dp[m][n][i] - delta[m][i / 2];  // now the gradient of the score
        }
      }
    }
    multiply<T, kD>(dq, p, k_tile, 0);
    barrier();  // nobody reads this stage any more
  }
  copy_wait<0>();
  barrier();
  float factor[kM][2];
#pragma unroll
  for (int m = 0; m < kM; ++m) factor[m][0] = factor[m][1] = a.scale;
  store_tile<T, kM, kD>(memory, warp * kM * 16, dq, factor, head_of<T>(g.dq, batch, head),
                        g.dq.token, warp_query, a.queries, a.channels);
}

// dk and dv: a block of kWarps warps owns 16 keys a warp and walks over the queries of all heads
// that share them. Scores stand transposed, keys as rows, so that they are at once the left operand
// of dv += P^T dout and dk += dS^T q.
template <int kD, int kWarps, int kQueries>
constexpr int dkv_bytes() {
  return 2 * kWarps * 16 * kD * 2 + 2 * kQueries * (2 * kD * 2 + 2 * 4);
}

template <class T, int kD, int kWarps, int kQueries, bool kDropout>
__global__ void __launch_bounds__(kWarps* kWarp, 1)
    attention_dkv(const CudaAttention a, const CudaAttentionGradient g) {
  constexpr int kKeys = kWarps * 16, kN = kQueries / 8, kThreads = kWarps * kWarp;
  const int batch = blockIdx.x / a.kv_heads, kv_head = blockIdx.x % a.kv_heads;
  const int group = a.heads / a.kv_heads;
  const int first_key = blockIdx.y * kKeys;
  const int thread = threadIdx.x, warp = thread / kWarp, lane = thread % kWarp;
  const int warp_key = first_key + warp * 16;
  const Sequence sequence(a, batch);
  const int first_query = sequence.first_query(first_key) / kQueries * kQueries;
  const int end_query =
      first_key < sequence.keys ? sequence.end_query(first_key + kKeys - 1) : first_query;

  char* memory = shared_memory();
  constexpr int kTile = kQueries * kD * 2, kStage = 2 * kTile + 2 * kQueries * 4;
  const uint32_t k_tile = shared_address(memory), v_tile = k_tile + kKeys * kD * 2;
  const int stages = 2 * kKeys * kD * 2;  // offset of two of: q, dout, lse, delta
  const auto load_queries = [&](int head, int query, int stage) {
    const uint32_t tile = k_tile + stages + stage * kStage;
    load_tile<kQueries, kD, kThreads>(tile, head_of<const T>(a.q, batch, head), a.q.token, query,
                                      a.queries, a.channels, thread);
    load_tile<kQueries, kD, kThreads>(tile + kTile, head_of<const T>(g.dout, batch, head),
                                      g.dout.token, query, a.queries, a.channels, thread);
    if (thread < 2 * kQueries) {
      const int i = thread % kQueries;
      const bool valid = query + i < a.queries;
      const int64_t row = (static_cast<int64_t>(batch) * a.heads + head) * a.queries + query + i;
      copy4(tile + 2 * kTile + thread * 4,
            (thread < kQueries ? a.lse : g.delta) + (valid ? row : 0), valid);
    }
  };

  float dk[1][kD / 8][4], dv[1][kD / 8][4];
  clear(dk);
  clear(dv);
  load_tile<kKeys, kD, kThreads>(k_tile, head_of<const T>(a.k, batch, kv_head), a.k.token,
                                 first_key, sequence.keys, a.channels, thread);
  load_tile<kKeys, kD, kThreads>(v_tile, head_of<const T>(a.v, batch, kv_head), a.v.token,
                                 first_key, sequence.keys, a.channels, thread);
  int head = kv_head * group, query = first_query, stage = 0;
  const int end_head = first_query < end_query ? head + group : head;
  if (head < end_head) load_queries(head, query, stage);
  copy_commit();
  const float scale = a.scale * kLog2E;
  while (head < end_head) {
    const bool last_tile = query + kQueries >= end_query;
    const int next_head = head + last_tile, next_query = last_tile ? first_query : query + kQueries;
    if (next_head < end_head) load_queries(next_head, next_query, stage ^ 1);
    copy_commit();
    copy_wait<1>();
    barrier();
    const int offset = stages + stage * kStage;
    const uint32_t q_tile = k_tile + offset, dout_tile = q_tile + kTile;
    const float* lse = reinterpret_cast<const float*>(memory + offset + 2 * kTile);
    const float* delta = lse + kQueries;
    float p[1][kN][4], dp[1][kN][4];
    uint32_t kept[kN];
    clear(p);
    multiply_transposed<T, kD>(p, k_tile, warp * 16, q_tile, 0);
    if (!sequence.all_visible(query, kQueries, warp_key, 16)) {
      mask_transposed(p, sequence, query, warp_key);
    }
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      const int column = n * 8 + lane % 4 * 2;
      if constexpr (kDropout) {
        kept[n] = Dropout(a, batch, head).kept_transposed(query + n * 8, warp_key);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        // forward: p = exp2(score * scale - lse)
        p[0][n][i] = fast_exp2(fmaf(p[0][n][i], scale, -lse[column + i % 2]));
      }
    }
    // forward: out += p kept v
    if constexpr (kDropout) {
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) dp[0][n][i] = kept[n] >> i & 1 ? p[0][n][i] : 0.0f;
      }
      multiply<T, kD>(dv, dp, dout_tile, 0);
    } else {
      multiply<T, kD>(dv, p, dout_tile, 0);
    }
    clear(dp);
    multiply_transposed<T, kD>(dp, v_tile, warp * 16, dout_tile, 0);
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float dweight = dp[0][n][i];
        if constexpr (kDropout) {
          dweight = kept[n] >> i & 1 ? dweight * a.kept_scale : 0.0f;
        }
        p[0][n][i] *= dweight - delta[n * 8 + lane % 4 * 2 + i % 2];
      }
    }
    multiply<T, kD>(dk, p, q_tile, 0);
    barrier();  // nobody reads this stage any more
    head = next_head, query = next_query, stage ^= 1;
  }
  copy_wait<0>();
  barrier();
  const float dk_factor[1][2] = {{a.scale, a.scale}};
  const float kept_scale = kDropout ? a.kept_scale : 1.0f;
  const float dv_factor[1][2] = {{kept_scale, kept_scale}};
  store_tile<T, 1, kD>(memory, warp * 16, dk, dk_factor, head_of<T>(g.dk, batch, kv_head),
                       g.dk.token, warp_key, a.keys, a.channels);
  store_tile<T, 1, kD>(memory + kKeys * kD * 2, warp * 16, dv, dv_factor,
                       head_of<T>(g.dv, batch, kv_head), g.dv.token, warp_key, a.keys, a.channels);
}

template <class T, int kD, int kM, int kKeys, bool kDropout>
void launch_dq(const CudaAttention& a, const CudaAttentionGradient& g, const CudaLaunch& launch) {
  constexpr int kRows = 4 * kM * 16;
  const dim3 grid(a.batches * a.heads, (a.queries + kRows - 1) / kRows);
  launch_kernel(attention_dq<T, kD, kM, kKeys, kDropout>, grid, 128, dq_bytes<kD, kM, kKeys>(),
                launch.device, launch.stream, a, g);
}

template <class T, int kD, int kQueries, bool kDropout>
void launch_dkv(const CudaAttention& a, const CudaAttentionGradient& g, const CudaLaunch& launch) {
  constexpr int kWarps = 8;
  const dim3 grid(a.batches * a.kv_heads, (a.keys + kWarps * 16 - 1) / (kWarps * 16));
  launch_kernel(attention_dkv<T, kD, kWarps, kQueries, kDropout>, grid, kWarps * kWarp,
                dkv_bytes<kD, kWarps, kQueries>(), launch.device, launch.stream, a, g);
}

template <class T, int kD>
void launch_delta_of(const CudaAttention& a, const CudaAttentionGradient& g,
                     const CudaLaunch& launch) {
  constexpr int kRows = 256 * 16 / sizeof(T) / kD;  // of a block
  const int64_t rows = static_cast<int64_t>(a.batches) * a.heads * a.queries;
  launch_kernel(attention_delta<T, kD>, dim3((rows + kRows - 1) / kRows), 256, 0, launch.device,
                launch.stream, a, g);
}
template <class T>
void launch_delta(const CudaAttention& a, const CudaAttentionGradient& g,
                  const CudaLaunch& launch) {
  a.channels <= 64 ? launch_delta_of<T, 64>(a, g, launch) : launch_delta_of<T, 128>(a, g, launch);
}

// Tiles as large as registers allow without spills, and shared memory within the 99 KB of consumer
// chips.
template <class T, bool kDropout>
void backward(const CudaAttention& a, const CudaAttentionGradient& g, const CudaLaunch& launch) {
  if (a.channels <= 64) {
    if (!kDropout && tall_blocks_fill(a, launch)) {
      launch_dq<T, 64, 2, 64, false>(a, g, launch);
    } else {
      launch_dq<T, 64, 1, 64, kDropout>(a, g, launch);
    }
    launch_dkv<T, 64, 64, kDropout>(a, g, launch);
  } else {
    launch_dq<T, 128, 1, kDropout ? 32 : 64, kDropout>(a, g, launch);
    launch_dkv<T, 128, 32, kDropout>(a, g, launch);
  }
}

template <class T>
void choose_dropout(const CudaAttention& a, const CudaAttentionGradient& g,
                    const CudaLaunch& launch) {
  launch_delta<T>(a, g, launch);
  a.dropout_threshold > 0 ? backward<T, true>(a, g, launch) : backward<T, false>(a, g, launch);
}

}  // namespace

void attention_backward_float(const CudaAttention& a, const CudaAttentionGradient& g,
                              const CudaLaunch& launch);

void cuda_attention_backward(const CudaAttention& a, const CudaAttentionGradient& g,
                             const CudaLaunch& launch) {
  switch (a.dtype) {
    case DType::kFloat32:
      launch_delta<float>(a, g, launch);
      return attention_backward_float(a, g, launch);
    case DType::kBFloat16:
      return choose_dropout<BFloat16>(a, g, launch);
    case DType::kFloat16:
      return choose_dropout<Float16>(a, g, launch);
  }
}

}  // namespace pygpt
