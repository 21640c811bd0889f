// Causal attention and its gradient in float32: the plain path, without matrix instructions.
//
// 4 or 8 neighbouring lanes own one row, 16 channels each: lane c has the float4s c, c + lanes, ...
// A block of 128 threads owns 32 or 16 rows and reads the other side's rows from shared memory, 32
// at a time. Each tile's sums start at zero and are added to the row's at its end, which keeps
// rounding errors small.
#include "cuda/common.cuh"

namespace pygpt {
namespace {

constexpr int kThreads = 128, kTile = 32;
template <int kD>
constexpr int kLanes = kD / 16;  // of a row
template <int kD>
constexpr int kRows = kThreads / kLanes<kD>;  // of a block

template <int kD, class Combine>
__device__ float row_reduce(float x, Combine combine) {
#pragma unroll
  for (int mask = 1; mask < kLanes<kD>; mask *= 2) x = combine(x, shuffle_xor(x, mask));
  return x;
}
template <int kD>
__device__ float row_sum(float x) {
  return row_reduce<kD>(x, [](float a, float b) { return a + b; });
}

// One lane's channels of a row.
template <int kD>
struct Slice {
  float x[16];

  // The first channel of its i-th group of four.
  __device__ static int channel(int i) { return (i * kLanes<kD> + threadIdx.x % kLanes<kD>)*4; }

  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < 16; ++i) x[i] = 0.0f;
  }
  __device__ void load(const float* row, bool exists, int channels) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int d = channel(i);
      const float4 y = exists && d < channels ? *reinterpret_cast<const float4*>(row + d)
                                              : float4{0.0f, 0.0f, 0.0f, 0.0f};
      x[4 * i] = y.x, x[4 * i + 1] = y.y, x[4 * i + 2] = y.z, x[4 * i + 3] = y.w;
    }
  }
  __device__ void store(float* row, float factor, int channels) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int d = channel(i);
      if (d < channels) {
        *reinterpret_cast<float4*>(row + d) = float4{x[4 * i] * factor, x[4 * i + 1] * factor,
                                                     x[4 * i + 2] * factor, x[4 * i + 3] * factor};
      }
    }
  }
  // The dot product with a row in shared memory, in all lanes of the row.
  __device__ float dot(const float* row) const {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float4 y = *reinterpret_cast<const float4*>(row + channel(i));
      sum = fmaf(x[4 * i], y.x, sum);
      sum = fmaf(x[4 * i + 1], y.y, sum);
      sum = fmaf(x[4 * i + 2], y.z, sum);
      sum = fmaf(x[4 * i + 3], y.w, sum);
    }
    return row_sum<kD>(sum);
  }
  __device__ void add(float weight, const float* row) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float4 y = *reinterpret_cast<const float4*>(row + channel(i));
      x[4 * i] = fmaf(weight, y.x, x[4 * i]);
      x[4 * i + 1] = fmaf(weight, y.y, x[4 * i + 1]);
      x[4 * i + 2] = fmaf(weight, y.z, x[4 * i + 2]);
      x[4 * i + 3] = fmaf(weight, y.w, x[4 * i + 3]);
    }
  }
  __device__ void scale_and_add(float factor, const Slice& other) {
#pragma unroll
    for (int i = 0; i < 16; ++i) x[i] = fmaf(x[i], factor, other.x[i]);
  }
};

// Rows [first, first + kTile) of one head; zeros at or past `end` and past `channels`.
template <int kD>
__device__ void load_rows(float* tile, const float* head, int64_t stride, int first, int end,
                          int channels) {
  const uint32_t address = shared_address(tile);
  for (int i = threadIdx.x; i < kTile * kD / 4; i += kThreads) {
    const int row = i / (kD / 4), d = i % (kD / 4) * 4;
    const bool valid = first + row < end && d < channels;
    copy16(address + i * 16, head + (valid ? (first + row) * stride + d : 0), valid);
  }
}

__device__ bool keeps(const Dropout& dropout, int query, int key) {
  const Philox call = dropout.words(query, key);
  const uint32_t word = key % 4 < 2 ? (key % 4 ? call.words[1] : call.words[0])
                                    : (key % 4 == 2 ? call.words[2] : call.words[3]);
  return word >= dropout.threshold;
}

template <int kD, bool kDropout>
__global__ void __launch_bounds__(kThreads) forward(const CudaAttention a) {
  constexpr int kL = kLanes<kD>;
  const int batch = blockIdx.x / a.heads, head = blockIdx.x % a.heads;
  const int kv_head = head / (a.heads / a.kv_heads), lane = threadIdx.x % kWarp;
  const int first_query = (gridDim.y - 1 - blockIdx.y) * kRows<kD>;
  const int query = first_query + threadIdx.x / kLanes<kD>;
  const bool exists = query < a.queries;
  const Sequence sequence(a, batch);
  const int end_key = sequence.last_key(least(first_query + kRows<kD>, a.queries) - 1) + 1;
  const int first = exists ? sequence.first_key(query) : 0;
  const int last = exists ? sequence.last_key(query) : -1;
  float* k_tile = reinterpret_cast<float*>(shared_memory());
  float* v_tile = k_tile + kTile * kD;
  const float scale = a.scale * kLog2E;
  Slice<kD> q, out;
  q.load(head_of<const float>(a.q, batch, head) + query * a.q.token, exists, a.channels);
  out.clear();
  float max = -INFINITY, sum = 0.0f;
  for (int key = sequence.first_key(first_query); key < end_key; key += kTile) {
    load_rows<kD>(k_tile, head_of<const float>(a.k, batch, kv_head), a.k.token, key, sequence.keys,
                  a.channels);
    load_rows<kD>(v_tile, head_of<const float>(a.v, batch, kv_head), a.v.token, key, sequence.keys,
                  a.channels);
    copy_commit();
    copy_wait<0>();
    barrier();
    float p[kTile / kL], tile_max = max;  // lane c holds keys kL i + c
#pragma unroll
    for (int j = 0; j < kTile; ++j) {
      const float score = q.dot(k_tile + j * kD);
      if (j % kL == lane % kL) p[j / kL] = key + j < first || key + j > last ? -INFINITY : score;
    }
#pragma unroll
    for (int i = 0; i < kTile / kL; ++i) tile_max = fmaxf(tile_max, p[i]);
    tile_max = row_reduce<kD>(tile_max, [](float x, float y) { return fmaxf(x, y); });
    const float shift = tile_max == -INFINITY ? 0.0f : tile_max * scale;
    const float correction = fast_exp2(max * scale - shift);
    max = tile_max;
    float tile_sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kTile / kL; ++i) {
      p[i] = fast_exp2(fmaf(p[i], scale, -shift));
      tile_sum += p[i];
      if constexpr (kDropout) {
        if (!keeps(Dropout(a, batch, head), query, key + kL * i + lane % kL)) p[i] = 0.0f;
      }
    }
    sum = fmaf(sum, correction, tile_sum);
    Slice<kD> tile_out;
    tile_out.clear();
#pragma unroll
    for (int j = 0; j < kTile; ++j) {
      tile_out.add(shuffle(p[j / kL], lane / kL * kL + j % kL), v_tile + j * kD);
    }
    out.scale_and_add(correction, tile_out);
    barrier();
  }
  sum = row_sum<kD>(sum);
  if (!exists) return;
  const float kept_scale = kDropout ? a.kept_scale : 1.0f;
  out.store(head_of<float>(a.out, batch, head) + query * a.out.token,
            sum > 0.0f ? kept_scale / sum : 0.0f, a.channels);
  if (lane % kL == 0) {
    a.lse[(static_cast<int64_t>(batch) * a.heads + head) * a.queries + query] =
        sum > 0.0f ? max * scale + log2f(sum) : INFINITY;
  }
}

template <int kD, bool kDropout>
__global__ void __launch_bounds__(kThreads)
    dq(const CudaAttention a, const CudaAttentionGradient g) {
  const int batch = blockIdx.x / a.heads, head = blockIdx.x % a.heads;
  const int kv_head = head / (a.heads / a.kv_heads);
  const int first_query = (gridDim.y - 1 - blockIdx.y) * kRows<kD>;
  const int query = first_query + threadIdx.x / kLanes<kD>;
  const bool exists = query < a.queries;
  const Sequence sequence(a, batch);
  const int end_key = sequence.last_key(least(first_query + kRows<kD>, a.queries) - 1) + 1;
  const int first = exists ? sequence.first_key(query) : 0;
  const int last = exists ? sequence.last_key(query) : -1;
  const int64_t row = (static_cast<int64_t>(batch) * a.heads + head) * a.queries + query;
  const float lse = exists ? a.lse[row] : 0.0f, delta = exists ? g.delta[row] : 0.0f;
  float* k_tile = reinterpret_cast<float*>(shared_memory());
  float* v_tile = k_tile + kTile * kD;
  Slice<kD> q, dout, dq;
  q.load(head_of<const float>(a.q, batch, head) + query * a.q.token, exists, a.channels);
  dout.load(head_of<const float>(g.dout, batch, head) + query * g.dout.token, exists, a.channels);
  dq.clear();
  for (int key = sequence.first_key(first_query); key < end_key; key += kTile) {
    load_rows<kD>(k_tile, head_of<const float>(a.k, batch, kv_head), a.k.token, key, sequence.keys,
                  a.channels);
    load_rows<kD>(v_tile, head_of<const float>(a.v, batch, kv_head), a.v.token, key, sequence.keys,
                  a.channels);
    copy_commit();
    copy_wait<0>();
    barrier();
    Slice<kD> tile_dq;
    tile_dq.clear();
#pragma unroll 2
    for (int j = 0; j < kTile; ++j) {
      const float score = q.dot(k_tile + j * kD);
      float dp = dout.dot(v_tile + j * kD);
      if constexpr (kDropout) {
        const Dropout dropout(a, batch, head);
        dp = keeps(dropout, query, key + j) ? dp * dropout.scale : 0.0f;
      }
      const float p =
          key + j < first || key + j > last ? 0.0f : fast_exp2(fmaf(score, a.scale * kLog2E, -lse));
      tile_dq.add(p * (dp - delta), k_tile + j * kD);
    }
    dq.scale_and_add(1.0f, tile_dq);
    barrier();
  }
  if (exists) {
    dq.store(head_of<float>(g.dq, batch, head) + query * g.dq.token, a.scale, a.channels);
  }
}

template <int kD, bool kDropout>
__global__ void __launch_bounds__(kThreads)
    dkv(const CudaAttention a, const CudaAttentionGradient g) {
  const int batch = blockIdx.x / a.kv_heads, kv_head = blockIdx.x % a.kv_heads;
  const int group = a.heads / a.kv_heads, first_key = blockIdx.y * kRows<kD>;
  const int key = first_key + threadIdx.x / kLanes<kD>;
  const Sequence sequence(a, batch);
  const bool exists = key < sequence.keys;
  const int first_query = sequence.first_query(first_key);
  const int end_query =
      first_key < sequence.keys ? sequence.end_query(first_key + kRows<kD> - 1) : first_query;
  float* q_tile = reinterpret_cast<float*>(shared_memory());
  float* dout_tile = q_tile + kTile * kD;
  Slice<kD> k, v, dk, dv;
  k.load(head_of<const float>(a.k, batch, kv_head) + key * a.k.token, exists, a.channels);
  v.load(head_of<const float>(a.v, batch, kv_head) + key * a.v.token, exists, a.channels);
  dk.clear();
  dv.clear();
  for (int head = kv_head * group; head < (kv_head + 1) * group; ++head) {
    const int64_t rows = (static_cast<int64_t>(batch) * a.heads + head) * a.queries;
    for (int query = first_query; query < end_query; query += kTile) {
      load_rows<kD>(q_tile, head_of<const float>(a.q, batch, head), a.q.token, query, a.queries,
                    a.channels);
      load_rows<kD>(dout_tile, head_of<const float>(g.dout, batch, head), g.dout.token, query,
                    a.queries, a.channels);
      copy_commit();
      copy_wait<0>();
      barrier();
      Slice<kD> tile_dk, tile_dv;
      tile_dk.clear();
      tile_dv.clear();
#pragma unroll 2
      for (int j = 0; j < least(kTile, a.queries - query); ++j) {
        const float score = k.dot(q_tile + j * kD);
        float dp = v.dot(dout_tile + j * kD), kept = 1.0f;
        if constexpr (kDropout) {
          const Dropout dropout(a, batch, head);
          kept = keeps(dropout, query + j, key) ? dropout.scale : 0.0f;
        }
        const bool seen =
            key <= sequence.last_key(query + j) && key >= sequence.first_key(query + j);
        const float p =
            seen ? fast_exp2(fmaf(score, a.scale * kLog2E, -a.lse[rows + query + j])) : 0.0f;
        tile_dv.add(p * kept, dout_tile + j * kD);
        tile_dk.add(p * (dp * kept - g.delta[rows + query + j]), q_tile + j * kD);
      }
      dk.scale_and_add(1.0f, tile_dk);
      dv.scale_and_add(1.0f, tile_dv);
      barrier();
    }
  }
  if (key < a.keys) {
    dk.store(head_of<float>(g.dk, batch, kv_head) + key * g.dk.token, a.scale, a.channels);
    dv.store(head_of<float>(g.dv, batch, kv_head) + key * g.dv.token, 1.0f, a.channels);
  }
}

template <int kD>
dim3 grid_of(const CudaAttention& a, int heads, int rows) {
  return dim3(a.batches * heads, (rows + kRows<kD> - 1) / kRows<kD>);
}

template <int kD, bool kDropout>
void launch_forward(const CudaAttention& a, const CudaLaunch& launch) {
  launch_kernel(forward<kD, kDropout>, grid_of<kD>(a, a.heads, a.queries), kThreads,
                2 * kTile * kD * 4, launch.device, launch.stream, a);
}

template <int kD, bool kDropout>
void launch_backward(const CudaAttention& a, const CudaAttentionGradient& g,
                     const CudaLaunch& launch) {
  constexpr int kBytes = 2 * kTile * kD * 4;
  launch_kernel(dq<kD, kDropout>, grid_of<kD>(a, a.heads, a.queries), kThreads, kBytes,
                launch.device, launch.stream, a, g);
  launch_kernel(dkv<kD, kDropout>, grid_of<kD>(a, a.kv_heads, a.keys), kThreads, kBytes,
                launch.device, launch.stream, a, g);
}

}  // namespace

void attention_forward_float(const CudaAttention& a, const CudaLaunch& launch) {
  const bool dropout = a.dropout_threshold > 0;
  if (a.channels <= 64) {
    dropout ? launch_forward<64, true>(a, launch) : launch_forward<64, false>(a, launch);
  } else {
    dropout ? launch_forward<128, true>(a, launch) : launch_forward<128, false>(a, launch);
  }
}

void attention_backward_float(const CudaAttention& a, const CudaAttentionGradient& g,
                              const CudaLaunch& launch) {
  const bool dropout = a.dropout_threshold > 0;
  if (a.channels <= 64) {
    dropout ? launch_backward<64, true>(a, g, launch) : launch_backward<64, false>(a, g, launch);
  } else {
    dropout ? launch_backward<128, true>(a, g, launch) : launch_backward<128, false>(a, g, launch);
  }
}

}  // namespace pygpt
