// The only file that knows Python: unpacks arguments, releases the GIL, translates errors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "core/blocks.h"
#include "core/error.h"
#include "core/isa.h"
#include "core/parallel.h"

namespace py = pybind11;

namespace pygpt {

void bind_tokenizer(py::module_& m);  // bindings_tokenizer.cpp
void bind_cuda(py::module_& m);       // bindings_cuda.cpp

namespace {

void bind_machine(py::module_& m) {
  m.def("isa", &current_isa);
  m.def("available_isas", &available_isas);
  m.def("set_torch_threads", [](uintptr_t parallel_for, uintptr_t get_num_threads) {
    set_torch_threads(reinterpret_cast<TorchParallelFor>(parallel_for),
                      reinterpret_cast<TorchGetNumThreads>(get_num_threads));
  });
  m.def("num_threads", &num_threads);
}

// A tensor as DLPack passes it on: the layout that every framework agrees on
// (https://dmlc.github.io/dlpack), of which torch.from_dlpack makes a tensor.
struct PassedTensor {
  void* data;
  int32_t device_type = 1, device = 0;  // the CPU
  int32_t dims;
  uint8_t type_code, type_bits;
  uint16_t type_lanes = 1;
  int64_t* shape;
  int64_t* strides = nullptr;  // row-major
  uint64_t byte_offset = 0;
  void* owner;
  void (*deleter)(PassedTensor*);
};

// An uninitialised tensor in a block of core/blocks.h, or None where there is none to have.
py::object empty_block(int dtype, std::vector<int64_t> shape) {
  const bool is_float = static_cast<DType>(dtype) == DType::kFloat32;
  size_t bytes = is_float ? 4 : 2;
  for (const int64_t size : shape) bytes *= static_cast<size_t>(size);
  void* block = take_block(bytes);
  if (!block) return py::none();
  auto* kept = new std::vector<int64_t>(std::move(shape));
  const uint8_t code = static_cast<DType>(dtype) == DType::kBFloat16 ? 4 : 2;
  auto* passed = new PassedTensor{.data = block,
                                  .dims = static_cast<int32_t>(kept->size()),
                                  .type_code = code,
                                  .type_bits = static_cast<uint8_t>(is_float ? 32 : 16),
                                  .shape = kept->data(),
                                  .owner = kept,
                                  .deleter = [](PassedTensor* tensor) {
                                    give_block(tensor->data);
                                    delete static_cast<std::vector<int64_t>*>(tensor->owner);
                                    delete tensor;
                                  }};
  return py::capsule(passed, "dltensor", [](PyObject* capsule) {  // renamed once it was taken over
    if (!PyCapsule_IsValid(capsule, "dltensor")) return;
    auto* tensor = static_cast<PassedTensor*>(PyCapsule_GetPointer(capsule, "dltensor"));
    tensor->deleter(tensor);
  });
}

void bind_blocks(py::module_& m) { m.def("empty_block", &empty_block); }

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void bind_sample(py::module_& m) {
  m.def("sample", [](uintptr_t logits, int dtype, int64_t rows, int64_t vocab,
                     int64_t logits_stride, uintptr_t parameters, int64_t parameters_stride,
                     uintptr_t uniforms, uintptr_t bias, int64_t bias_stride, uintptr_t history,
                     int64_t history_length, uintptr_t tokens) {
    if (rows && (!logits || !parameters || !uniforms || !tokens)) {
      throw std::invalid_argument("sample was given a tensor without memory");
    }
    const py::gil_scoped_release release;
    cpu_kernels().sample({pointer<void>(logits), static_cast<DType>(dtype), rows, vocab,
                          logits_stride, pointer<SampleParameters>(parameters), parameters_stride,
                          pointer<double>(uniforms), pointer<float>(bias), bias_stride,
                          pointer<int64_t>(history), history_length, pointer<int64_t>(tokens)});
    for (int64_t row = 0; row < rows; ++row) {
      if (pointer<int64_t>(tokens)[row] >= 0) continue;
      throw std::invalid_argument("row " + std::to_string(row) +
                                  " of logits has NaN, +inf or no finite value; look at the model "
                                  "that made it");
    }
  });
}

void bind_cross_entropy(py::module_& m) {
  // Number of targets that are not ignore_index; throws where one is outside the vocabulary.
  m.def("count_targets", [](uintptr_t targets, int64_t rows, int64_t vocab, int64_t ignore_index) {
    if (rows && !targets) throw std::invalid_argument("targets have no memory");
    int64_t count = 0;
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t target = pointer<int64_t>(targets)[row];
      if (target == ignore_index) continue;
      if (target < 0 || target >= vocab) {
        throw std::invalid_argument("target " + std::to_string(target) +
                                    " is outside the vocabulary of " + std::to_string(vocab) +
                                    " and is not ignore_index " + std::to_string(ignore_index));
      }
      ++count;
    }
    return count;
  });
  // Returns the sum of the losses; targets have been counted, and so checked, before.
  m.def("cross_entropy", [](uintptr_t logits, int dtype, int64_t rows, int64_t vocab,
                            int64_t logits_stride, uintptr_t targets, int64_t ignore_index,
                            uintptr_t losses, uintptr_t gradient, int64_t gradient_stride,
                            float scale, uintptr_t scales) {
    if (rows && (!logits || !targets || !losses)) {
      throw std::invalid_argument("cross_entropy was given a tensor without memory");
    }
    const py::gil_scoped_release release;
    cpu_kernels().cross_entropy({pointer<void>(logits), static_cast<DType>(dtype), rows, vocab,
                                 logits_stride, pointer<int64_t>(targets), ignore_index,
                                 pointer<float>(losses), pointer<void>(gradient), gradient_stride,
                                 scale, pointer<float>(scales)});
    double total = 0;
    for (int64_t row = 0; row < rows; ++row) {
      total += static_cast<double>(pointer<float>(losses)[row]);
    }
    return total;
  });
}

using AttentionShape = std::array<int64_t, 6>;    // batch, queries, keys, heads, kv_heads, dim
using AttentionPlace = std::array<uintptr_t, 4>;  // address and strides of batch, row, head

AttentionArgs attention_args(int dtype, const AttentionShape& shape, double scale, int64_t window,
                             uintptr_t document_ids, uintptr_t kv_lengths, double dropout_p,
                             uintptr_t seed) {
  const auto [batch, queries, keys, heads, kv_heads, dim] = shape;
  AttentionArgs a{};
  a.dtype = static_cast<DType>(dtype);
  a.batch = batch;
  a.queries = queries;
  a.keys = keys;
  a.heads = heads;
  a.kv_heads = kv_heads;
  a.dim = dim;
  a.scale = static_cast<float>(scale);
  a.window = window;
  a.document_ids = pointer<int32_t>(document_ids);
  a.kv_lengths = pointer<int32_t>(kv_lengths);
  a.dropout_p = dropout_p;
  if (dropout_p > 0) {
    if (!seed) throw std::invalid_argument("attention with dropout was given no seed");
    a.seed = *pointer<uint64_t>(seed);
  }
  return a;
}

AttentionTensor attention_tensor(const AttentionPlace& place) {
  if (!place[0]) throw std::invalid_argument("attention was given a tensor without memory");
  return {pointer<void>(place[0]), static_cast<int64_t>(place[1]), static_cast<int64_t>(place[2]),
          static_cast<int64_t>(place[3])};
}

void bind_attention(py::module_& m) {
  m.def(
      "attention_forward", [](int dtype, const AttentionShape& shape, double scale, int64_t window,
                              uintptr_t document_ids, uintptr_t kv_lengths, double dropout_p,
                              uintptr_t seed, const AttentionPlace& q, const AttentionPlace& k,
                              const AttentionPlace& v, const AttentionPlace& out, uintptr_t lse) {
        AttentionArgs a =
            attention_args(dtype, shape, scale, window, document_ids, kv_lengths, dropout_p, seed);
        a.q = attention_tensor(q);
        a.k = attention_tensor(k);
        a.v = attention_tensor(v);
        a.out = attention_tensor(out);
        a.lse = pointer<float>(lse);
        const py::gil_scoped_release release;
        cpu_kernels().attention_forward(a);
      });
  m.def("attention_backward", [](int dtype, const AttentionShape& shape, double scale,
                                 int64_t window, uintptr_t document_ids, uintptr_t kv_lengths,
                                 double dropout_p, uintptr_t seed,
                                 const std::array<AttentionPlace, 8>& tensors, uintptr_t lse) {
    AttentionArgs a =
        attention_args(dtype, shape, scale, window, document_ids, kv_lengths, dropout_p, seed);
    AttentionTensor* const slots[] = {&a.q, &a.k, &a.v, &a.out, &a.dout, &a.dq, &a.dk, &a.dv};
    for (int i = 0; i < 8; ++i) *slots[i] = attention_tensor(tensors[i]);
    a.lse = pointer<float>(lse);
    const py::gil_scoped_release release;
    cpu_kernels().attention_backward(a);
  });
}

void bind_gemm(py::module_& m) {
  m.def("gemm",
        [](int64_t rows, int64_t cols, int64_t depth, uintptr_t a, int a_type, int64_t a_m_stride,
           int64_t a_k_stride, uintptr_t b, int b_type, int64_t b_k_stride, int64_t b_n_stride,
           uintptr_t c, int c_type, int64_t c_stride, uintptr_t bias, bool accumulate) {
          if (!rows || !cols) return;
          if (!a || !b || !c) throw std::invalid_argument("gemm was given a tensor without memory");
          const py::gil_scoped_release release;
          cpu_kernels().gemm({rows, cols, depth, pointer<void>(a), static_cast<DType>(a_type),
                              a_m_stride, a_k_stride, pointer<void>(b), static_cast<DType>(b_type),
                              b_k_stride, b_n_stride, pointer<void>(c), static_cast<DType>(c_type),
                              c_stride, pointer<float>(bias), accumulate});
        });
}

void bind_gelu(py::module_& m) {
  m.def("gelu", [](uintptr_t x, int dtype, int64_t size, uintptr_t grad, uintptr_t out) {
    if (size && (!x || !out)) throw std::invalid_argument("gelu was given a tensor without memory");
    const py::gil_scoped_release release;
    cpu_kernels().gelu({pointer<void>(x), static_cast<DType>(dtype), size, pointer<void>(grad),
                        pointer<void>(out)});
  });
}

void bind_add_norm(py::module_& m) {
  m.def("add_norm",
        [](int dtype, int64_t rows, int64_t width, uintptr_t x, uintptr_t branch, uintptr_t weight,
           uintptr_t bias, double eps, uintptr_t sum, uintptr_t normed, uintptr_t moments) {
          if (!rows || !width) return;
          if (!x || !branch || !weight || !bias || !sum || !normed || !moments) {
            throw std::invalid_argument("add_norm was given a tensor without memory");
          }
          AddNormArgs a{};
          a.dtype = static_cast<DType>(dtype);
          a.rows = rows;
          a.width = width;
          a.x = pointer<float>(x);
          a.branch = pointer<void>(branch);
          a.weight = pointer<float>(weight);
          a.bias = pointer<float>(bias);
          a.eps = static_cast<float>(eps);
          a.sum = pointer<float>(sum);
          a.normed = pointer<void>(normed);
          a.moments = pointer<float>(moments);
          const py::gil_scoped_release release;
          cpu_kernels().add_norm(a);
        });
  m.def("add_norm_backward",
        [](int dtype, int64_t rows, int64_t width, uintptr_t sum, uintptr_t weight,
           uintptr_t moments, uintptr_t dnormed, uintptr_t dsum, uintptr_t dx, uintptr_t dbranch,
           uintptr_t dweight, uintptr_t dbias) {
          if (!sum || !weight || !moments || !dnormed || !dx || !dweight || !dbias) {
            throw std::invalid_argument("add_norm_backward was given a tensor without memory");
          }
          AddNormArgs a{};
          a.dtype = static_cast<DType>(dtype);
          a.rows = rows;
          a.width = width;
          a.weight = pointer<float>(weight);
          a.sum = pointer<float>(sum);
          a.moments = pointer<float>(moments);
          a.dnormed = pointer<void>(dnormed);
          a.dsum = pointer<float>(dsum);
          a.dx = pointer<float>(dx);
          a.dbranch = pointer<void>(dbranch);
          a.dweight = pointer<float>(dweight);
          a.dbias = pointer<float>(dbias);
          const py::gil_scoped_release release;
          cpu_kernels().add_norm(a);
        });
}

void bind_crc32c(py::module_& m) {
  m.def("crc32c", [](uintptr_t data, int64_t size) {
    if (size && !data) throw std::invalid_argument("crc32c was given a tensor without memory");
    const py::gil_scoped_release release;
    return cpu_kernels().crc32c(pointer<uint8_t>(data), size);
  });
}

void translate(std::exception_ptr error) {
  try {
    if (error) std::rethrow_exception(error);
  } catch (const KeyError& e) {
    py::set_error(PyExc_KeyError, e.what());
  } catch (const DataError& e) {
    py::set_error(py::module_::import("pygpt.errors").attr("DataError"), e.what());
  } catch (const ResourceError& e) {
    py::set_error(py::module_::import("pygpt.errors").attr("ResourceError"), e.what());
  } catch (const UserError& e) {
    py::set_error(py::module_::import("pygpt.errors").attr("PygptError"), e.what());
  }
}

}  // namespace
}  // namespace pygpt

PYBIND11_MODULE(_native, m) {
  using namespace pygpt;
  py::register_local_exception_translator(&translate);
  current_isa();  // an unknown PYGPT_ISA is an error here, not at the first call
  bind_machine(m);
  bind_blocks(m);
  bind_tokenizer(m);
  bind_cuda(m);
  bind_attention(m);
  bind_sample(m);
  bind_cross_entropy(m);
  bind_gemm(m);
  bind_gelu(m);
  bind_add_norm(m);
  bind_crc32c(m);
}
