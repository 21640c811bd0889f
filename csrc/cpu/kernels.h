// What every instruction set offers: plain structs in, nothing allocated for the caller, no Python.
// To add a kernel: its argument struct and an entry here, its code in a .cpp of this folder inside
// namespace pygpt::PYGPT_ISA_NAMESPACE, its name in the table of kernels.cpp, its binding.
#pragma once

#include <cstdint>

namespace pygpt {

enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// How one row is sampled; top_k 0, top_p 1 and min_p 0 switch their filter off. The layout is that
// of the rows of a float64 tensor.
struct SampleParameters {
  double temperature, top_k, top_p, min_p;
  double repetition_penalty, presence_penalty, frequency_penalty;
};

struct SampleArgs {
  const void* logits;  // (rows, vocab)
  DType dtype;
  int64_t rows, vocab, logits_stride;
  const SampleParameters* parameters;  // one, or one per row
  int64_t parameters_stride;
  const double* uniforms;  // (rows) in [0, 1)
  const float* bias;       // (vocab) or (rows, vocab), or null
  int64_t bias_stride;
  const int64_t* history;  // (rows, history_length); negative entries are padding
  int64_t history_length;
  int64_t* tokens;  // (rows); -1 where a row has NaN, +inf, or no finite logit
};

struct CrossEntropyArgs {
  const void* logits;  // (rows, vocab)
  DType dtype;
  int64_t rows, vocab, logits_stride;
  const int64_t* targets;  // (rows), each ignore_index or in [0, vocab)
  int64_t ignore_index;
  float* losses;   // (rows); 0 where ignored
  void* gradient;  // (rows, vocab) of dtype; may be the logits' own memory; null: none
  int64_t gradient_stride;
  float scale;          // multiplies every row's gradient,
  const float* scales;  // (rows) and so does the row's own, where given
};

// (batch, rows, heads, dim), strides in elements, dim contiguous.
struct AttentionTensor {
  void* data = nullptr;
  int64_t batch = 0, row = 0, head = 0;
};

// Causal attention: q, out (batch, queries, heads, dim); k, v (batch, keys, kv_heads, dim).
struct AttentionArgs {
  DType dtype;
  int64_t batch, queries, keys, heads, kv_heads, dim;  // keys >= queries; heads % kv_heads == 0
  float scale;                                         // > 0
  int64_t window;               // keys that a query sees, itself included; 0: all before it
  const int32_t* document_ids;  // (batch, keys), non-decreasing in a row, or null
  const int32_t* kv_lengths;    // (batch,): keys in use, the last of them the last query's; or null
  double dropout_p;
  uint64_t seed;  // of the dropout
  AttentionTensor q, k, v, out;
  float* lse;  // (batch, heads, queries): log2 of the sum of 2^(score * log2 e); or null (forward)
  AttentionTensor dout, dq, dk, dv;  // of the backward, to which out and lse are inputs
};

// c = a b (+ bias), or c += a b: a (m, k), b (k, n), c (m, n) with unit stride along n. Of each
// pair of strides of a and of b one is 1. Each is float32 or bfloat16; the product is made in
// bfloat16, with float32 sums, unless a and b are both float32.
struct GemmArgs {
  int64_t m, n, k;
  const void* a;
  DType a_type;
  int64_t a_m_stride, a_k_stride;
  const void* b;
  DType b_type;
  int64_t b_k_stride, b_n_stride;
  void* c;
  DType c_type;
  int64_t c_stride;
  const float* bias;  // (n) or null
  bool accumulate;
};

// One bit a byte, of 64 bytes; the lowest bit is the first byte.
struct ByteClasses {
  uint64_t upper, lower, digit, space, newline, blank, apostrophe;
  uint64_t high, trailing;  // not ASCII; of these 0x80 to 0xBF
};

struct GeluArgs {
  const void* x;  // (size) of dtype, as are the others
  DType dtype;
  int64_t size;
  const void* grad;  // of the output, or null: forward
  void* out;         // the output, or with `grad` the gradient of x
};

// sum = x + branch and normed = LayerNorm(sum), of (rows, width); branch and normed are of dtype.
// With `dnormed` the gradients, to which sum and moments are inputs.
struct AddNormArgs {
  DType dtype;
  int64_t rows, width;
  const float* x;
  const void* branch;
  const float *weight, *bias;  // (width)
  float eps;
  float* sum;
  void* normed;
  float* moments;  // (rows, 2): the mean, and the inverse of the standard deviation
  const void* dnormed;
  const float* dsum;  // or null: none
  float* dx;
  void* dbranch;  // or null: not wanted
  float *dweight, *dbias;
};

struct CpuKernels {
  const char* name;
  void (*sample)(const SampleArgs&);
  void (*cross_entropy)(const CrossEntropyArgs&);
  void (*attention_forward)(const AttentionArgs&);
  void (*attention_backward)(const AttentionArgs&);
  void (*gemm)(const GemmArgs&);
  void (*byte_classes)(const uint8_t* text, int64_t blocks, ByteClasses* out);
  void (*gelu)(const GeluArgs&);
  void (*add_norm)(const AddNormArgs&);
  uint32_t (*crc32c)(const uint8_t* data, int64_t size);
};

}  // namespace pygpt
