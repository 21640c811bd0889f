// Attention of a few queries over many keys, as in generation: the keys of one (batch, kv head) are
// split among blocks and, in a block, among warps; each keeps a softmax of its own, merged at the
// end.
//
// The queries of all heads that share the keys, 16 at most, are the rows of one mma tile. A warp
// reads 16 keys at a time through its own ring of stages, so warps never wait for each other: the
// kernel's work is to keep enough bytes on their way from memory.
#include "cuda/common.cuh"

namespace pygpt {
namespace {

constexpr int kWarps = 4, kThreads = kWarps * kWarp, kRows = 16, kKeys = 16;

template <int kD>
constexpr int kStages = kD == 64 ? 4 : 2;
template <int kD>
constexpr int kStageBytes = 2 * kKeys * kD * 2;
template <int kD>
constexpr int decode_bytes() {
  return kRows * kD * 2 + kWarps * kStages<kD> * kStageBytes<kD> + kWarps * kRows * 2 * 4;
}

// A part's place in the workspace: (B, H, T, parts, channels) sums, then (B, H, T, parts, 2)
// maximum and total.
struct Parts {
  float* sums;
  float* totals;
  int64_t count;

  __host__ __device__ Parts(const CudaAttention& a, int splits, float* workspace)
      : sums(workspace),
        totals(workspace +
               static_cast<int64_t>(a.batches) * a.heads * a.queries * splits * a.channels),
        count(splits) {}
};

template <class T, int kD>
__global__ void __launch_bounds__(kThreads)
    decode(const CudaAttention a, const int splits, float* workspace) {
  const int batch = blockIdx.x / a.kv_heads, kv_head = blockIdx.x % a.kv_heads;
  const int group = a.heads / a.kv_heads, rows = group * a.queries;  // row = query * group + head
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const Sequence sequence(a, batch);
  // This block's share of the keys that anyone here sees, in whole tiles; and this warp's tiles of
  // it.
  const int first_tile = sequence.first_key(0) / kKeys;
  const int end_key = sequence.keys, tiles = (end_key + kKeys - 1) / kKeys - first_tile;
  const int per_block = greatest((tiles + splits - 1) / splits, 0);
  const int begin = first_tile + static_cast<int>(blockIdx.y) * per_block;
  const int end = least(begin + per_block, first_tile + tiles);

  char* memory = shared_memory();
  const uint32_t q_tile = shared_address(memory);
  const uint32_t ring = q_tile + kRows * kD * 2 + warp * kStages<kD> * kStageBytes<kD>;
  float* totals =
      reinterpret_cast<float*>(memory + kRows * kD * 2 + kWarps * kStages<kD> * kStageBytes<kD>);
  const T* k = head_of<const T>(a.k, batch, kv_head);
  const T* v = head_of<const T>(a.v, batch, kv_head);
  const auto load_keys = [&](int tile, int stage) {
    const uint32_t to = ring + stage * kStageBytes<kD>;
    load_tile<kKeys, kD, kWarp>(to, k, a.k.token, tile * kKeys, sequence.keys, a.channels, lane);
    load_tile<kKeys, kD, kWarp>(to + kKeys * kD * 2, v, a.v.token, tile * kKeys, sequence.keys,
                                a.channels, lane);
  };
  for (int i = threadIdx.x; i < kRows * kD / 8; i += kThreads) {
    const int row = i / (kD / 8), chunk = i % (kD / 8);
    const bool valid = row < rows && chunk * 8 < a.channels;
    const T* from = head_of<const T>(a.q, batch, kv_head * group + (valid ? row % group : 0)) +
                    (valid ? row / group * a.q.token + chunk * 8 : 0);
    copy16(q_tile + tile_offset<kD>(row, chunk), from, valid);
  }
  copy_commit();
  copy_wait<0>();
  barrier();
  for (int i = 0; i < kStages<kD> - 1; ++i) {
    if (begin + warp + i * kWarps < end) load_keys(begin + warp + i * kWarps, i);
    copy_commit();
  }
  const float scale = a.scale * kLog2E;
  float out[1][kD / 8][4], max[2] = {-INFINITY, -INFINITY}, sum[2] = {0.0f, 0.0f};
  clear(out);
  int first[2], last[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = lane / 4 + half * 8;
    first[half] = row < rows ? sequence.first_key(row / group) : 0;
    last[half] = row < rows ? sequence.last_key(row / group) : -1;
  }
  for (int tile = begin + warp, stage = 0; tile < end; tile += kWarps) {
    copy_wait<kStages<kD> - 2>();
    warp_barrier();  // the stage is here, and the one before it is free
    const int ahead = tile + (kStages<kD> - 1) * kWarps;
    if (ahead < end) load_keys(ahead, (stage + kStages<kD> - 1) % kStages<kD>);
    copy_commit();
    const uint32_t k_tile = ring + stage * kStageBytes<kD>;
    stage = (stage + 1) % kStages<kD>;
    float p[1][2][4];
    clear(p);
    multiply_transposed<T, kD>(p, q_tile, 0, k_tile, 0);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float tile_max = max[half];
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int key = tile * kKeys + n * 8 + lane % 4 * 2 + i;
          float& score = p[0][n][half * 2 + i];
          if (key < first[half] || key > last[half]) score = -INFINITY;
          tile_max = fmaxf(tile_max, score);
        }
      }
      tile_max = quad_max(tile_max);
      const float shift = tile_max == -INFINITY ? 0.0f : tile_max * scale;
      const float correction = fast_exp2(max[half] * scale - shift);
      max[half] = tile_max;
      sum[half] *= correction;
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int i = half * 2; i < half * 2 + 2; ++i) {
          p[0][n][i] = fast_exp2(fmaf(p[0][n][i], scale, -shift));
          sum[half] += p[0][n][i];
        }
      }
#pragma unroll
      for (int n = 0; n < kD / 8; ++n) {
        out[0][n][half * 2] *= correction;
        out[0][n][half * 2 + 1] *= correction;
      }
    }
    multiply<T, kD>(out, p, k_tile + kKeys * kD * 2, 0);
  }
  copy_wait<0>();

  // Merge the warps: totals, then sums, a warp at a time in shared memory that the rings leave
  // free.
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    sum[half] = quad_sum(sum[half]);
    if (lane % 4 == 0) {
      totals[(warp * kRows + lane / 4 + half * 8) * 2] = max[half] * scale;
      totals[(warp * kRows + lane / 4 + half * 8) * 2 + 1] = sum[half];
    }
  }
  barrier();
  float* sums = reinterpret_cast<float*>(memory);  // (kWarps, kRows, kD)
  float block_max[2], block_sum[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float* total = totals + (lane / 4 + half * 8) * 2;
    block_max[half] = -INFINITY;
    for (int w = 0; w < kWarps; ++w) block_max[half] = fmaxf(block_max[half], total[w * kRows * 2]);
    const float shift = block_max[half] == -INFINITY ? 0.0f : block_max[half];
    block_sum[half] = 0.0f;
    for (int w = 0; w < kWarps; ++w) {
      block_sum[half] += total[w * kRows * 2 + 1] * fast_exp2(total[w * kRows * 2] - shift);
    }
    const float correction = fast_exp2(max[half] * scale - shift);
#pragma unroll
    for (int n = 0; n < kD / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        sums[(warp * kRows + lane / 4 + half * 8) * kD + n * 8 + lane % 4 * 2 + i] =
            out[0][n][half * 2 + i] * correction;
      }
    }
  }
  barrier();
  const Parts parts(a, splits, workspace);
  for (int i = threadIdx.x; i < rows * a.channels; i += kThreads) {
    const int row = i / a.channels, d = i % a.channels;
    float x = 0.0f;
    for (int w = 0; w < kWarps; ++w) x += sums[(w * kRows + row) * kD + d];
    const int64_t place =
        (static_cast<int64_t>(batch) * a.heads + kv_head * group + row % group) * a.queries +
        row / group;
    parts.sums[(place * splits + blockIdx.y) * a.channels + d] = x;
  }
  if (warp == 0 && lane % 4 == 0) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = lane / 4 + half * 8;
      if (row >= rows) continue;
      const int64_t place =
          (static_cast<int64_t>(batch) * a.heads + kv_head * group + row % group) * a.queries +
          row / group;
      parts.totals[(place * splits + blockIdx.y) * 2] = block_max[half];
      parts.totals[(place * splits + blockIdx.y) * 2 + 1] = block_sum[half];
    }
  }
}

// The parts of each row together, in the order of the keys; a block per row.
template <class T>
__global__ void __launch_bounds__(128)
    merge(const CudaAttention a, const int splits, float* workspace) {
  const Parts parts(a, splits, workspace);
  const int64_t place = blockIdx.x;
  const int query = place % a.queries, head = place / a.queries % a.heads;
  const int batch = place / a.queries / a.heads;
  const float* totals = parts.totals + place * splits * 2;
  float max = -INFINITY, sum = 0.0f;
  for (int s = 0; s < splits; ++s) max = fmaxf(max, totals[2 * s]);
  const float shift = max == -INFINITY ? 0.0f : max;
  for (int s = 0; s < splits; ++s) sum += totals[2 * s + 1] * fast_exp2(totals[2 * s] - shift);
  if (threadIdx.x == 0) a.lse[place] = sum > 0.0f ? shift + log2f(sum) : INFINITY;
  T* out = head_of<T>(a.out, batch, head) + query * a.out.token;
  for (int d = threadIdx.x; d < a.channels; d += 128) {
    float x = 0.0f;
    for (int s = 0; s < splits; ++s) {
      x += parts.sums[(place * splits + s) * a.channels + d] * fast_exp2(totals[2 * s] - shift);
    }
    out[d] = from_float<T>(sum > 0.0f ? x / sum : 0.0f);
  }
}

template <class T, int kD>
void launch_decode(const CudaAttention& a, int splits, float* workspace, const CudaLaunch& launch) {
  static_assert(kWarps * kRows * kD * 4 <= kRows * kD * 2 + kWarps * kStages<kD> * kStageBytes<kD>);
  launch_kernel(decode<T, kD>, dim3(a.batches * a.kv_heads, splits), kThreads, decode_bytes<kD>(),
                launch.device, launch.stream, a, splits, workspace);
  launch_kernel(merge<T>, dim3(a.batches * a.heads * a.queries), 128, 0, launch.device,
                launch.stream, a, splits, workspace);
}

}  // namespace

int32_t cuda_attention_splits(const CudaAttention& a, const CudaLaunch& launch) {
  const bool fits = a.heads / a.kv_heads * a.queries <= kRows && a.dropout_threshold == 0 &&
                    a.dtype != DType::kFloat32;
  if (!fits) return 0;
  // About two blocks for each multiprocessor, of 256 keys at least.
  const int blocks = a.batches * a.kv_heads;
  const int wanted = (2 * multiprocessors(launch.device) + blocks - 1) / blocks;
  return greatest(least(wanted, (a.keys + 255) / 256), 1);
}

void cuda_attention_decode(const CudaAttention& a, int32_t splits, float* workspace,
                           const CudaLaunch& launch) {
  if (a.dtype == DType::kBFloat16) {
    a.channels <= 64 ? launch_decode<BFloat16, 64>(a, splits, workspace, launch)
                     : launch_decode<BFloat16, 128>(a, splits, workspace, launch);
  } else {
    a.channels <= 64 ? launch_decode<Float16, 64>(a, splits, workspace, launch)
                     : launch_decode<Float16, 128>(a, splits, workspace, launch);
  }
}

}  // namespace pygpt
