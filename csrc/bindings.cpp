// The only file that knows Python: unpacks arguments, releases the GIL, translates errors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <initializer_list>
#include <optional>
#include <vector>

#include "bindings_tensors.h"
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

void bind_tensors(py::module_& m) {
  m.def("set_tensor_types", &set_tensor_types);
  m.def("all_plain", &all_plain);
  m.def("keep_memory", &keep_memory);
  m.def("empty", [](int dtype, const std::vector<int64_t>& shape) {
    return make_tensor(static_cast<DType>(dtype), shape);
  });
}

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void bind_sample(py::module_& m) {
  // logits (B, V) and bias of contiguous rows, parameters (1 or B, 7), uniforms (B,) and history
  // (B, L) contiguous: pygpt/ops/sampling.py has checked them.
  m.def("sample", [](py::handle logits, py::handle parameters, py::handle uniforms,
                     std::optional<py::handle> bias, std::optional<py::handle> history) {
    const PassedTensor z = read_tensor(logits), settings = read_tensor(parameters);
    SampleArgs a{};
    a.logits = z.as<void>();
    a.dtype = z.dtype().value();
    a.rows = z.shape[0];
    a.vocab = z.shape[1];
    a.logits_stride = z.strides[0];
    a.parameters = settings.as<SampleParameters>();
    a.parameters_stride = settings.shape[0] > 1 ? 1 : 0;
    a.uniforms = read_tensor(uniforms).as<double>();
    if (bias) {
      const PassedTensor added = read_tensor(*bias);
      a.bias = added.as<float>();
      a.bias_stride = added.strides[0];
    }
    if (history) {
      const PassedTensor before = read_tensor(*history);
      a.history = before.as<int64_t>();
      a.history_length = before.shape[1];
    }
    void* place;
    py::object tokens = make_tensor({}, {a.rows}, &place);
    a.tokens = static_cast<int64_t*>(place);
    {
      const py::gil_scoped_release release;
      cpu_kernels().sample(a);
    }
    for (int64_t row = 0; row < a.rows; ++row) {
      if (a.tokens[row] >= 0) continue;
      throw std::invalid_argument("row " + std::to_string(row) +
                                  " of logits has NaN, +inf or no finite value; look at the model "
                                  "that made it");
    }
    return tokens;
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

// The tensors and settings of a call of attention, as pygpt/ops/attention.py passes them on.
struct AttentionCall {
  py::handle q, k, v;
  double scale;
  int64_t window;
  std::optional<py::handle> document_ids, kv_lengths;
  double dropout_p;
  std::optional<py::handle> seed;
};

AttentionTensor attention_tensor(const PassedTensor& x) {
  return {x.as<void>(), x.strides[0], x.strides[1], x.strides[2]};
}

AttentionArgs attention_args(const AttentionCall& call) {
  const PassedTensor q = read_tensor(call.q), k = read_tensor(call.k), v = read_tensor(call.v);
  AttentionArgs a{};
  a.dtype = q.dtype().value();
  a.batch = q.shape[0];
  a.queries = q.shape[1];
  a.keys = k.shape[1];
  a.heads = q.shape[2];
  a.kv_heads = k.shape[2];
  a.dim = q.shape[3];
  a.scale = static_cast<float>(call.scale);
  a.window = call.window;
  if (call.document_ids) a.document_ids = read_tensor(*call.document_ids).as<int32_t>();
  if (call.kv_lengths) a.kv_lengths = read_tensor(*call.kv_lengths).as<int32_t>();
  a.dropout_p = call.dropout_p;
  if (a.dropout_p > 0) {
    if (!call.seed) throw std::invalid_argument("attention with dropout was given no seed");
    a.seed = *read_tensor(*call.seed).as<uint64_t>();
  }
  a.q = attention_tensor(q);
  a.k = attention_tensor(k);
  a.v = attention_tensor(v);
  return a;
}

// A tensor of the kernel's own, contiguous.
py::object new_attention_tensor(DType dtype, int64_t batch, int64_t rows, int64_t heads,
                                int64_t dim, AttentionTensor* tensor) {
  py::object made = make_tensor(dtype, {batch, rows, heads, dim}, &tensor->data);
  tensor->head = dim;
  tensor->row = heads * dim;
  tensor->batch = rows * tensor->row;
  return made;
}

// Whether these are plain tensors on the CPU that fit together, so that nothing is to be converted
// or said. What does not fit pygpt/ops/attention.py treats or names.
bool attention_fits(py::handle q, py::handle k, py::handle v, std::optional<double> scale,
                    std::optional<int64_t> window, std::optional<py::handle> document_ids,
                    std::optional<py::handle> kv_lengths, double dropout_p,
                    std::optional<py::handle> seed) {
  const auto queries = read_plain_tensor(q), keys = read_plain_tensor(k),
             values = read_plain_tensor(v);
  if (!queries || !keys || !values) return false;
  for (const PassedTensor& x : {*queries, *keys, *values}) {
    if (x.dims != 4 || !x.dtype() || x.dtype() != queries->dtype() || x.strides[3] != 1) {
      return false;
    }
    if (x.shape[0] != queries->shape[0] || x.shape[3] != queries->shape[3]) return false;
  }
  const int64_t kv_heads = keys->shape[2], dim = queries->shape[3];
  const bool fit = keys->shape[1] == values->shape[1] && keys->shape[1] >= queries->shape[1] &&
                   kv_heads == values->shape[2] && kv_heads > 0 &&
                   queries->shape[2] % kv_heads == 0 && dim % 8 == 0 && dim > 0 && dim <= 256;
  if (!fit || !(scale.value_or(1) > 0 && std::isfinite(scale.value_or(1)))) return false;
  if (window.value_or(1) < 1 || !(dropout_p >= 0 && dropout_p < 1)) return false;
  const auto vector_fits = [](std::optional<py::handle> object, int bits,
                              std::initializer_list<int64_t> shape) {
    if (!object) return true;
    const auto x = read_plain_tensor(*object);
    return x && x->is_int(bits) &&
           std::equal(x->shape, x->shape + x->dims, shape.begin(), shape.end()) &&
           x->is_contiguous();
  };
  const int64_t batch = queries->shape[0];
  return vector_fits(document_ids, 32, {batch, keys->shape[1]}) &&
         vector_fits(kv_lengths, 32, {batch}) && vector_fits(seed, 64, {1});
}

void bind_attention(py::module_& m) {
  m.def("attention_fits", &attention_fits);
  // The result; the log-sum-exps go to `lse`, (B, H, T) float32, where given.
  m.def("attention_forward", [](py::handle q, py::handle k, py::handle v, double scale,
                                int64_t window, std::optional<py::handle> document_ids,
                                std::optional<py::handle> kv_lengths, double dropout_p,
                                std::optional<py::handle> seed, std::optional<py::handle> lse) {
    AttentionArgs a =
        attention_args({q, k, v, scale, window, document_ids, kv_lengths, dropout_p, seed});
    py::object out = new_attention_tensor(a.dtype, a.batch, a.queries, a.heads, a.dim, &a.out);
    if (lse) a.lse = read_tensor(*lse).as<float>();
    const py::gil_scoped_release release;
    if (a.batch * a.queries * a.heads > 0) cpu_kernels().attention_forward(a);
    return out;
  });
  // The gradients of q, k and v, for `dout` of the result.
  m.def("attention_backward",
        [](py::handle dout, py::handle q, py::handle k, py::handle v, py::handle out,
           py::handle lse, double scale, int64_t window, std::optional<py::handle> document_ids,
           std::optional<py::handle> kv_lengths, double dropout_p, std::optional<py::handle> seed) {
          AttentionArgs a =
              attention_args({q, k, v, scale, window, document_ids, kv_lengths, dropout_p, seed});
          a.dout = attention_tensor(read_tensor(dout));
          a.out = attention_tensor(read_tensor(out));
          a.lse = read_tensor(lse).as<float>();
          py::object dq = new_attention_tensor(a.dtype, a.batch, a.queries, a.heads, a.dim, &a.dq);
          py::object dk = new_attention_tensor(a.dtype, a.batch, a.keys, a.kv_heads, a.dim, &a.dk);
          py::object dv = new_attention_tensor(a.dtype, a.batch, a.keys, a.kv_heads, a.dim, &a.dv);
          {
            const py::gil_scoped_release release;
            cpu_kernels().attention_backward(a);
          }
          return py::make_tuple(dq, dk, dv);
        });
}

void bind_gemm(py::module_& m) {
  // out = a b + bias, or out += a b; bias (N,) is contiguous float32.
  m.def("gemm", [](py::handle a, py::handle b, py::handle out, std::optional<py::handle> bias,
                   bool accumulate) {
    const PassedTensor left = read_tensor(a), right = read_tensor(b), result = read_tensor(out);
    if (left.dims != 2 || right.dims != 2 || result.dims != 2 || left.shape[1] != right.shape[0] ||
        result.shape[0] != left.shape[0] || result.shape[1] != right.shape[1]) {
      throw std::invalid_argument("gemm needs a (M, K), b (K, N) and out (M, N)");
    }
    if (!result.shape[0] || !result.shape[1]) return;
    const auto has_lines = [](const PassedTensor& x) {
      return x.strides[0] == 1 || x.strides[1] == 1;
    };
    if (!has_lines(left) || !has_lines(right) || (result.strides[1] != 1 && result.shape[1] != 1)) {
      throw std::invalid_argument("gemm needs unit strides, of out along its rows");
    }
    GemmArgs g{};
    g.m = left.shape[0], g.n = right.shape[1], g.k = left.shape[1];
    g.a = left.as<void>(), g.a_type = left.dtype().value();
    g.a_m_stride = left.strides[0], g.a_k_stride = left.strides[1];
    g.b = right.as<void>(), g.b_type = right.dtype().value();
    g.b_k_stride = right.strides[0], g.b_n_stride = right.strides[1];
    g.c = result.as<void>(), g.c_type = result.dtype().value();
    g.c_stride = result.strides[0];
    if (bias) g.bias = read_tensor(*bias).as<float>();
    g.accumulate = accumulate;
    const py::gil_scoped_release release;
    cpu_kernels().gemm(g);
  });
  // x weight^T + bias for few rows; None for what gemm is needed for, or pygpt/ops/product.py.
  m.def("linear_of_few_rows",
        [](py::handle x, py::handle weight, std::optional<py::handle> bias) -> py::object {
          const auto rows = read_plain_tensor(x), matrix = read_plain_tensor(weight);
          const auto added = bias ? read_plain_tensor(*bias) : std::nullopt;
          if (!rows || !matrix || (bias && !added)) return py::none();
          const auto dtype = rows->dtype();
          if (!dtype || *dtype == DType::kFloat16 || rows->dims < 1 || !rows->is_contiguous() ||
              matrix->dtype() != dtype || matrix->dims != 2 ||
              (matrix->strides[0] != 1 && matrix->strides[1] != 1)) {
            return py::none();
          }
          const int64_t depth = matrix->shape[1], cols = matrix->shape[0];
          std::vector<int64_t> shape(rows->shape, rows->shape + rows->dims);
          if (shape.back() != depth) return py::none();
          shape.back() = cols;
          int64_t count = 1;
          for (size_t i = 0; i + 1 < shape.size(); ++i) count *= shape[i];
          if (added && (added->dtype() != dtype || added->dims != 1 || added->shape[0] != cols ||
                        !added->is_contiguous())) {
            return py::none();
          }
          GemmArgs g{};
          g.m = count, g.n = cols, g.k = depth;
          g.a = rows->as<void>(), g.b = matrix->as<void>();
          g.a_type = g.b_type = g.c_type = *dtype;
          g.a_m_stride = depth, g.a_k_stride = 1;
          g.b_k_stride = matrix->strides[1], g.b_n_stride = matrix->strides[0];
          g.c_stride = cols;
          std::vector<float> wide;
          if (added && *dtype == DType::kBFloat16) {
            const uint16_t* narrow = added->as<uint16_t>();
            wide.resize(static_cast<size_t>(cols));
            for (int64_t i = 0; i < cols; ++i) {
              wide[static_cast<size_t>(i)] =
                  std::bit_cast<float>(static_cast<uint32_t>(narrow[i]) << 16);
            }
            g.bias = wide.data();
          } else if (added) {
            g.bias = added->as<float>();
          }
          py::object out = make_tensor(*dtype, shape, &g.c);
          const py::gil_scoped_release release;
          if (count && cols) cpu_kernels().gemm(g);
          return out;
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
  bind_tensors(m);
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
