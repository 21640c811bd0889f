// Python's door to csrc/cuda. Addresses, sizes and strides come in as they are; pygpt/ops/ has
// checked them. `launch` is the device's index and the stream's handle.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <initializer_list>
#include <stdexcept>
#include <tuple>
#include <utility>

#include "core/philox.h"
#include "cuda/cuda.h"

namespace py = pybind11;

namespace pygpt {
namespace {

using Launch = std::pair<int, uintptr_t>;
using Shape = std::array<int64_t, 6>;    // batches, queries, keys, heads, kv_heads, channels
using Place = std::array<uintptr_t, 4>;  // address and strides of batch, token, head
// dtype, shape, scale, window, document_starts, kv_lengths, dropout_p, seed
using Common = std::tuple<int, Shape, double, int64_t, uintptr_t, uintptr_t, double, uintptr_t>;

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

CudaLaunch on(const Launch& launch) { return {launch.first, pointer<void>(launch.second)}; }

void require_memory(std::initializer_list<uintptr_t> addresses) {
  for (const uintptr_t address : addresses) {
    if (!address) throw std::invalid_argument("a CUDA kernel was given a tensor without memory");
  }
}

CudaTensor tensor(const Place& place) {
  require_memory({place[0]});
  return {pointer<void>(place[0]), static_cast<int64_t>(place[1]), static_cast<int64_t>(place[2]),
          static_cast<int64_t>(place[3])};
}

CudaAttention attention(const Common& common) {
  const auto& [dtype, shape, scale, window, starts, lengths, dropout_p, seed] = common;
  CudaAttention a{};
  a.dtype = static_cast<DType>(dtype);
  int32_t* const sizes[] = {&a.batches, &a.queries, &a.keys, &a.heads, &a.kv_heads, &a.channels};
  for (int i = 0; i < 6; ++i) *sizes[i] = static_cast<int32_t>(shape[i]);
  a.scale = static_cast<float>(scale);
  a.window = static_cast<int32_t>(window < a.keys ? window : 0);  // as wide as the keys: none
  a.document_starts = pointer<int32_t>(starts);
  a.kv_lengths = pointer<int32_t>(lengths);
  a.dropout_threshold = dropout_threshold(dropout_p);
  a.kept_scale = static_cast<float>(1.0 / (1.0 - dropout_p));
  a.seed = pointer<int64_t>(seed);
  if (dropout_p > 0) require_memory({seed});
  return a;
}

CudaAttention attention(const Common& common, const std::array<Place, 4>& tensors, uintptr_t lse) {
  require_memory({lse});
  CudaAttention a = attention(common);
  CudaTensor* const slots[] = {&a.q, &a.k, &a.v, &a.out};
  for (int i = 0; i < 4; ++i) *slots[i] = tensor(tensors[i]);
  a.lse = pointer<float>(lse);
  return a;
}

}  // namespace

void bind_cuda(py::module_& m) {
  m.def("cuda_info", [] {
    const CudaInfo info = cuda_info();
    py::dict d;
    d["built"] = info.built;
    d["runtime_version"] = info.runtime_version;
    d["driver_version"] = info.driver_version;
    d["devices"] = info.devices;
    d["why_unusable"] = info.why_unusable;
    return d;
  });
  m.def("cuda_problem", &cuda_problem);
  m.def("cuda_attention_splits", [](const Launch& launch, const Common& common) {
    return cuda_attention_splits(attention(common), on(launch));
  });
  // tensors: q, k, v, out
  m.def("cuda_attention_forward", [](const Launch& launch, const Common& common,
                                     const std::array<Place, 4>& tensors, uintptr_t lse) {
    const CudaAttention a = attention(common, tensors, lse);
    const py::gil_scoped_release release;
    cuda_attention_forward(a, on(launch));
  });
  m.def("cuda_attention_decode",
        [](const Launch& launch, const Common& common, const std::array<Place, 4>& tensors,
           uintptr_t lse, int splits, uintptr_t workspace) {
          const CudaAttention a = attention(common, tensors, lse);
          require_memory({workspace});
          const py::gil_scoped_release release;
          cuda_attention_decode(a, splits, pointer<float>(workspace), on(launch));
        });
  // gradients: dout, dq, dk, dv
  m.def("cuda_attention_backward", [](const Launch& launch, const Common& common,
                                      const std::array<Place, 4>& tensors, uintptr_t lse,
                                      const std::array<Place, 4>& gradients, uintptr_t delta) {
    const CudaAttention a = attention(common, tensors, lse);
    require_memory({delta});
    const CudaAttentionGradient g{tensor(gradients[0]), tensor(gradients[1]), tensor(gradients[2]),
                                  tensor(gradients[3]), pointer<float>(delta)};
    const py::gil_scoped_release release;
    cuda_attention_backward(a, g, on(launch));
  });
  // parameters_here: one for all rows, in this process's memory
  m.def("cuda_sample",
        [](const Launch& launch, uintptr_t logits, int dtype, int64_t rows, int64_t vocab,
           int64_t logits_stride, uintptr_t parameters, int64_t parameters_stride,
           uintptr_t uniforms, uintptr_t bias, int64_t bias_stride, uintptr_t history,
           int64_t history_length, uintptr_t tokens, uintptr_t keys, bool parameters_here) {
          require_memory({logits, parameters, uniforms, tokens, keys});
          const auto* all = pointer<SampleParameters>(parameters);
          const SampleParameters common = parameters_here ? *all : SampleParameters{};
          const py::gil_scoped_release release;
          cuda_sample({pointer<void>(logits), static_cast<DType>(dtype), rows, vocab, logits_stride,
                       parameters_here ? nullptr : all, parameters_stride,
                       pointer<double>(uniforms), pointer<float>(bias), bias_stride,
                       pointer<int64_t>(history), history_length, pointer<int64_t>(tokens)},
                      common, pointer<int32_t>(keys), on(launch));
        });
  m.def("cuda_cross_entropy",
        [](const Launch& launch, uintptr_t logits, int dtype, int64_t rows, int64_t vocab,
           int64_t logits_stride, uintptr_t targets, int64_t ignore_index, uintptr_t losses,
           uintptr_t row_scale, int64_t row_scale_stride) {
          require_memory({logits, targets, losses});
          const py::gil_scoped_release release;
          cuda_cross_entropy({pointer<void>(logits), static_cast<DType>(dtype), rows, vocab,
                              logits_stride, pointer<int64_t>(targets), ignore_index,
                              pointer<float>(losses), pointer<float>(row_scale), row_scale_stride},
                             on(launch));
        });
}

}  // namespace pygpt
