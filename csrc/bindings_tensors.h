// torch's tensors, read and made without torch's headers: the structs and functions by which DLPack
// 1.3 (https://dmlc.github.io/dlpack) passes tensors between libraries, as far as they serve here.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "cpu/kernels.h"

namespace pygpt {

struct PassedTensor {
  void* data;
  int32_t device_type, device;
  int32_t dims;
  uint8_t type_code, type_bits;
  uint16_t type_lanes;
  int64_t* shape;
  int64_t* strides;  // in elements
  uint64_t byte_offset;

  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(static_cast<char*>(data) + byte_offset);
  }
  bool is_int(int bits) const { return type_code == 0 && type_bits == bits && type_lanes == 1; }
  bool has_memory() const;  // or needs none
  bool is_contiguous() const;
  std::optional<DType> dtype() const;  // none for what kernels do not compute in
};

// Takes over torch.Tensor's functions; from then on the others can be called.
void set_tensor_types(pybind11::type tensor, pybind11::type parameter);

// A tensor on the CPU as it lies, while its object lives; throws for anything else.
PassedTensor read_tensor(pybind11::handle object);
// The same; none for anything else, and for subclasses but nn.Parameter.
std::optional<PassedTensor> read_plain_tensor(pybind11::handle object);
// Whether read_plain_tensor would read all of the objects that are tensors.
bool all_plain(const pybind11::args& objects);

// An uninitialised tensor on the CPU, float or (with no dtype) int64; from kept memory if it is
// large and `keep_memory` has been called. `place` receives its address.
pybind11::object make_tensor(std::optional<DType> dtype, std::vector<int64_t> shape,
                             void** place = nullptr);
void keep_memory();

}  // namespace pygpt
