// Causal attention, forward, 16-bit types, for sm_80 and later: the online softmax of
// FlashAttention-2 (Dao, 2023) on mma.sync.
//
// A block of 4 warps owns 64 or 128 queries of one head and walks over tiles of keys, from the
// first visible one to the diagonal. A warp owns whole rows, so softmax needs only its own
// registers. While scores are computed the values arrive, while softmax and the second product run
// the next keys do.
#include "cuda/common.cuh"

namespace pygpt {
namespace {

constexpr int kThreads = 128;

template <int kD, int kM, int kKeys>
constexpr int forward_bytes() {
  return (4 * kM * 16 + 2 * kKeys) * kD * 2;
}

template <class T, int kD, int kM, int kKeys, bool kDropout>
__global__ void __launch_bounds__(kThreads, 2) attention_forward(const CudaAttention a) {
  constexpr int kRows = 4 * kM * 16, kN = kKeys / 8;
  const int batch = blockIdx.x / a.heads, head = blockIdx.x % a.heads;
  const int first_query = (gridDim.y - 1 - blockIdx.y) * kRows;  // the longest rows start first
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int thread = opaque(static_cast<int>(threadIdx.x));  // else sm_90 spills at 128 channels
  const int warp_query = first_query + warp * kM * 16;
  const Sequence sequence(a, batch);
  const int end_key = sequence.last_key(least(first_query + kRows, a.queries) - 1) + 1;
  const int first_key = sequence.first_key(first_query) / kKeys * kKeys;
  const T* q = head_of<const T>(a.q, batch, head);
  const T* k = head_of<const T>(a.k, batch, head / (a.heads / a.kv_heads));
  const T* v = head_of<const T>(a.v, batch, head / (a.heads / a.kv_heads));

  char* memory = shared_memory();
  const uint32_t q_tile = shared_address(memory);
  const uint32_t k_tile = q_tile + kRows * kD * 2, v_tile = k_tile + kKeys * kD * 2;
  const float scale = a.scale * kLog2E;
  float out[kM][kD / 8][4], max[kM][2], sum[kM][2];
  clear(out);
#pragma unroll
  for (int m = 0; m < kM; ++m) {
    max[m][0] = max[m][1] = -INFINITY;
    sum[m][0] = sum[m][1] = 0.0f;
  }

  load_tile<kRows, kD, kThreads>(q_tile, q, a.q.token, first_query, a.queries, a.channels, thread);
  load_tile<kKeys, kD, kThreads>(k_tile, k, a.k.token, first_key, sequence.keys, a.channels,
                                 thread);
  copy_commit();
  for (int key = first_key; key < end_key; key += kKeys) {
    copy_wait<0>();
    barrier();  // the keys are here, and nobody reads the values before these any more
    load_tile<kKeys, kD, kThreads>(v_tile, v, a.v.token, key, sequence.keys, a.channels, thread);
    copy_commit();
    float scores[kM][kN][4];
    clear(scores);
    multiply_transposed<T, kD>(scores, q_tile, warp * kM * 16, k_tile, 0);

    if (!sequence.all_visible(warp_query, kM * 16, key, kKeys)) {
      mask(scores, sequence, warp_query, key);
    }
    copy_wait<0>();
    barrier();  // the values are here, and nobody reads these keys any more
    if (key + kKeys < end_key) {
      load_tile<kKeys, kD, kThreads>(k_tile, k, a.k.token, key + kKeys, sequence.keys, a.channels,
                                     thread);
    }
    copy_commit();

#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float tile_max = max[m][half];
#pragma unroll
        for (int n = 0; n < kN; ++n) {
          tile_max = fmaxf(tile_max, fmaxf(scores[m][n][half * 2], scores[m][n][half * 2 + 1]));
        }
        tile_max = quad_max(tile_max);
        const float shift = tile_max == -INFINITY ? 0.0f : tile_max * scale;
        const float correction = fast_exp2(max[m][half] * scale - shift);
        max[m][half] = tile_max;
        float tile_sum = 0.0f;
#pragma unroll
        for (int n = 0; n < kN; ++n) {
#pragma unroll
          for (int i = half * 2; i < half * 2 + 2; ++i) {
            scores[m][n][i] = fast_exp2(fmaf(scores[m][n][i], scale, -shift));
            tile_sum += scores[m][n][i];
          }
        }
        sum[m][half] = sum[m][half] * correction + tile_sum;
#pragma unroll
        for (int n = 0; n < kD / 8; ++n) {
          out[m][n][half * 2] *= correction;
          out[m][n][half * 2 + 1] *= correction;
        }
      }
    }
    if constexpr (kDropout) {
      const Dropout dropout(a, batch, head);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int n = 0; n < kN; ++n) {
          const uint32_t kept = dropout.kept(warp_query + m * 16, key + n * 8);
#pragma unroll
          for (int i = 0; i < 4; ++i) scores[m][n][i] = kept >> i & 1 ? scores[m][n][i] : 0.0f;
        }
      }
    }
    multiply<T, kD>(out, scores, v_tile, 0);
  }
  copy_wait<0>();
  barrier();  // a block without keys still waits for its queries' tile, which now takes the result

  // Found again here, so that the loop need not keep them in registers.
  const int block = opaque(static_cast<int>(blockIdx.x));
  const int out_batch = block / a.heads, out_head = block % a.heads;
  float factor[kM][2];
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int query = warp_query + m * 16 + half * 8 + lane / 4;
      const float total = quad_sum(sum[m][half]);
      factor[m][half] = total > 0.0f ? 1.0f / total : 0.0f;
      if constexpr (kDropout) factor[m][half] *= a.kept_scale;
      if (lane % 4 == 0 && query < a.queries) {
        a.lse[(static_cast<int64_t>(out_batch) * a.heads + out_head) * a.queries + query] =
            total > 0.0f ? max[m][half] * scale + log2f(total) : INFINITY;
      }
    }
  }
  store_tile<T, kM, kD>(memory, warp * kM * 16, out, factor, head_of<T>(a.out, out_batch, out_head),
                        a.out.token, warp_query, a.queries, a.channels);
}

template <class T, int kD, int kM, int kKeys, bool kDropout>
void launch_forward(const CudaAttention& a, const CudaLaunch& launch) {
  constexpr int kRows = 4 * kM * 16;
  const dim3 grid(a.batches * a.heads, (a.queries + kRows - 1) / kRows);
  launch_kernel(attention_forward<T, kD, kM, kKeys, kDropout>, grid, kThreads,
                forward_bytes<kD, kM, kKeys>(), launch.device, launch.stream, a);
}

template <class T, int kD>
void choose_rows(const CudaAttention& a, const CudaLaunch& launch) {
  // Short blocks leave registers for dropout.
  if (a.dropout_threshold > 0) {
    launch_forward<T, kD, 1, 64, true>(a, launch);
  } else if (tall_blocks_fill(a, launch)) {
    launch_forward<T, kD, 2, kD == 64 ? 64 : 32, false>(a, launch);
  } else {
    launch_forward<T, kD, 1, 64, false>(a, launch);
  }
}

template <class T>
void choose_channels(const CudaAttention& a, const CudaLaunch& launch) {
  a.channels <= 64 ? choose_rows<T, 64>(a, launch) : choose_rows<T, 128>(a, launch);
}

}  // namespace

void attention_forward_float(const CudaAttention& a, const CudaLaunch& launch);

void cuda_attention_forward(const CudaAttention& a, const CudaLaunch& launch) {
  if (a.dtype == DType::kFloat32) return attention_forward_float(a, launch);
  a.dtype == DType::kBFloat16 ? choose_channels<BFloat16>(a, launch)
                              : choose_channels<Float16>(a, launch);
}

}  // namespace pygpt
