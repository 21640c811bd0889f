// The CUDA side of the module. Built without nvcc, absent.cpp stands in.
//
// Every entry launches on args.stream of args.device and returns at once: nothing is allocated,
// nothing waits for the GPU, so calls can be captured in CUDA graphs. Errors of a launch throw
// UserError.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace pygpt {

struct CudaInfo {
  bool built = false;
  int runtime_version = 0;  // of the toolkit this module was built with, e.g. 13000
  int driver_version = 0;   // highest CUDA version that the installed driver supports, 0: no driver
  std::vector<std::string> devices;  // "NVIDIA H100 (sm_90)"
  std::string why_unusable;          // empty when the kernels can run here
};

CudaInfo cuda_info();

// Why the kernels of this build cannot run on a device (it holds code for other ones, say), or
// nothing.
std::string cuda_problem(int device);

struct CudaLaunch {
  int32_t device;
  void* stream;
};

// A (batch, token, head, channel) tensor whose last dimension is contiguous; strides in elements.
struct CudaTensor {
  void* data;
  int64_t batch, token, head;
};

// Query i of a row with n keys (n = S, or kv_lengths[b]) stands at n - T + i. It sees the keys up
// to there that are less than `window` back (0: no window) and not before document_starts[b,
// position], which must not decrease along a row.
struct CudaAttention {
  CudaTensor q, k, v, out;  // out is read by the backward
  float* lse;               // (B, H, T), log-sum-exp in base 2 of the scaled scores
  int32_t batches, queries, keys, heads, kv_heads, channels;
  DType dtype;
  float scale;                     // > 0
  int32_t window;                  // 0: none
  const int32_t* document_starts;  // (B, S), or null
  const int32_t* kv_lengths;       // (B), or null
  uint32_t dropout_threshold;      // of core/philox.h; 0: no dropout
  float kept_scale;                // 1 / (1 - p), of the weights that stay
  const int64_t* seed;             // one element on the device; read where there is dropout
};

struct CudaAttentionGradient {
  CudaTensor dout, dq, dk, dv;
  float* delta;  // (B, H, T) workspace
};

// 16-bit types: rows of 16-byte chunks, so channels % 8 == 0, at most 128, and every pointer and
// stride a multiple of 16 bytes. float32 likewise in multiples of 4 channels.
void cuda_attention_forward(const CudaAttention& args, const CudaLaunch& launch);
void cuda_attention_backward(const CudaAttention& args, const CudaAttentionGradient& gradient,
                             const CudaLaunch& launch);

// Few queries, many keys: the keys are split among blocks. Into how many parts, so that the caller
// can allocate a float workspace of parts * B * H * T * (channels + 2); 0 where the forward is to
// be used.
int32_t cuda_attention_splits(const CudaAttention& args, const CudaLaunch& launch);
void cuda_attention_decode(const CudaAttention& args, int32_t splits, float* workspace,
                           const CudaLaunch& launch);

// One token per row as CpuKernels::sample, with the same result; -1 for a row without one. All rows
// take `common` where args.parameters is null; `keys` is a workspace of rows * vocab.
void cuda_sample(const SampleArgs& args, const SampleParameters& common, int32_t* keys,
                 const CudaLaunch& launch);

struct CudaCrossEntropy {
  void* logits;  // (rows, vocab), last dimension contiguous; becomes its gradient where asked for
  DType dtype;
  int64_t rows, vocab, logits_stride;
  const int64_t* targets;  // (rows)
  int64_t ignore_index;
  float* losses;           // (rows); 0 where the target is ignored
  const float* row_scale;  // (1) or (rows): factor of the gradient; null: no gradient
  int64_t row_scale_stride;
};
void cuda_cross_entropy(const CudaCrossEntropy& args, const CudaLaunch& launch);

}  // namespace pygpt
