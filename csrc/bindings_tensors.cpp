#include "bindings_tensors.h"

#include <algorithm>
#include <utility>

#include "core/blocks.h"

namespace py = pybind11;

namespace pygpt {
namespace {

constexpr int32_t kCpu = 1;
constexpr size_t kLarge = 1 << 18;  // bytes from which a tensor is worth a block of its own

struct ManagedTensor {
  uint32_t major = 1, minor = 0;
  void* owner = nullptr;
  void (*deleter)(ManagedTensor*) = nullptr;
  uint64_t flags = 0;
  PassedTensor tensor{};
};

using SetError = void (*)(void* context, const char* kind, const char* message);

struct Exchange {
  uint32_t major, minor;
  const Exchange* previous;
  int (*allocate)(PassedTensor* like, ManagedTensor** out, void* context, SetError set_error);
  int (*managed_from_object)(void* object, ManagedTensor** out);
  int (*object_from_managed)(ManagedTensor* tensor, void** object);
  int (*tensor_from_object)(void* object, PassedTensor* out);
  int (*current_stream)(int32_t device_type, int32_t device, void** stream);
};

const Exchange* exchange = nullptr;
PyTypeObject *tensor_type = nullptr, *parameter_type = nullptr;
bool keeps_memory = false;

struct Block {
  ManagedTensor managed;
  std::vector<int64_t> sizes;  // shape, then strides
};

ManagedTensor* in_block(void* memory, const PassedTensor& tensor) {
  auto* block = new Block;
  block->sizes.assign(tensor.shape, tensor.shape + tensor.dims);
  block->sizes.insert(block->sizes.end(), tensor.strides, tensor.strides + tensor.dims);
  block->managed.tensor = tensor;
  block->managed.tensor.data = memory;
  block->managed.tensor.shape = block->sizes.data();
  block->managed.tensor.strides = block->sizes.data() + tensor.dims;
  block->managed.owner = block;
  block->managed.deleter = [](ManagedTensor* managed) {
    give_block(managed->tensor.data);
    delete static_cast<Block*>(managed->owner);
  };
  return &block->managed;
}

ManagedTensor* from_torch(PassedTensor& tensor) {
  ManagedTensor* managed = nullptr;
  const int failed = exchange->allocate(
      &tensor, &managed, nullptr,
      [](void*, const char*, const char* message) { py::set_error(PyExc_RuntimeError, message); });
  if (failed) throw py::error_already_set();
  return managed;
}

}  // namespace

std::optional<DType> PassedTensor::dtype() const {
  constexpr uint8_t kFloat = 2, kBFloat = 4;
  if (type_lanes != 1) return {};
  if (type_code == kFloat && type_bits == 32) return DType::kFloat32;
  if (type_code == kFloat && type_bits == 16) return DType::kFloat16;
  if (type_code == kBFloat && type_bits == 16) return DType::kBFloat16;
  return {};
}

bool PassedTensor::has_memory() const {
  return data || std::find(shape, shape + dims, 0) != shape + dims;
}

bool PassedTensor::is_contiguous() const {
  int64_t count = 1;
  for (int32_t i = dims; i-- > 0; count *= shape[i]) {
    if (shape[i] != 1 && strides[i] != count) return false;
  }
  return true;
}

void set_tensor_types(py::type tensor, py::type parameter) {
  const py::capsule found = tensor.attr("__dlpack_c_exchange_api__");
  exchange = found.get_pointer<Exchange>();
  while (exchange && exchange->major != 1) exchange = exchange->previous;
  if (!exchange) throw std::runtime_error("this torch passes tensors by another DLPack than 1.x");
  tensor_type = reinterpret_cast<PyTypeObject*>(tensor.release().ptr());
  parameter_type = reinterpret_cast<PyTypeObject*>(parameter.release().ptr());
}

PassedTensor read_tensor(py::handle object) {
  if (!PyObject_TypeCheck(object.ptr(), tensor_type)) throw py::type_error("expected a tensor");
  PassedTensor tensor;
  if (exchange->tensor_from_object(object.ptr(), &tensor)) throw py::error_already_set();
  if (tensor.device_type != kCpu) throw py::type_error("expected a tensor on the CPU");
  if (!tensor.has_memory()) throw std::invalid_argument("a tensor has no memory any more");
  return tensor;
}

std::optional<PassedTensor> read_plain_tensor(py::handle object) {
  if (Py_TYPE(object.ptr()) != tensor_type && Py_TYPE(object.ptr()) != parameter_type) return {};
  PassedTensor tensor;
  if (exchange->tensor_from_object(object.ptr(), &tensor)) {
    PyErr_Clear();  // sparse, quantised, ...
    return {};
  }
  if (tensor.device_type != kCpu || !tensor.has_memory()) return {};
  return tensor;
}

bool all_plain(const py::args& objects) {
  return std::all_of(objects.begin(), objects.end(), [](py::handle x) {
    return !PyObject_TypeCheck(x.ptr(), tensor_type) || read_plain_tensor(x);
  });
}

py::object make_tensor(std::optional<DType> dtype, std::vector<int64_t> shape, void** place) {
  const int64_t bits = !dtype ? 64 : *dtype == DType::kFloat32 ? 32 : 16;
  std::vector<int64_t> strides(shape.size());
  int64_t count = 1;
  bool fits = true;
  for (size_t i = shape.size(); i-- > 0;) {
    strides[i] = count;
    fits = fits && !__builtin_mul_overflow(count, shape[i], &count);
  }
  PassedTensor tensor{.data = nullptr,
                      .device_type = kCpu,
                      .device = 0,
                      .dims = static_cast<int32_t>(shape.size()),
                      .type_code = static_cast<uint8_t>(!dtype                       ? 0
                                                        : *dtype == DType::kBFloat16 ? 4
                                                                                     : 2),
                      .type_bits = static_cast<uint8_t>(bits),
                      .type_lanes = 1,
                      .shape = shape.data(),
                      .strides = strides.data(),
                      .byte_offset = 0};
  int64_t bytes;
  fits = fits && !__builtin_mul_overflow(count, bits / 8, &bytes);
  const bool large = keeps_memory && fits && bytes >= static_cast<int64_t>(kLarge);
  void* block = large ? take_block(static_cast<size_t>(bytes)) : nullptr;
  ManagedTensor* managed = block ? in_block(block, tensor) : from_torch(tensor);
  if (place) *place = managed->tensor.as<void>();
  void* object = nullptr;
  if (exchange->object_from_managed(managed, &object)) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(static_cast<PyObject*>(object));
}

void keep_memory() { keeps_memory = true; }

}  // namespace pygpt
