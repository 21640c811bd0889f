// csrc/bindings_cuda.cpp over the emulated kernels, as a Python module: what pygpt._native is on a
// machine with a GPU, for tensors of the CPU.
#include <pybind11/pybind11.h>

#include "cuda/cuda.h"

namespace pygpt {

void bind_cuda(pybind11::module_& m);

CudaInfo cuda_info() { return {}; }
std::string cuda_problem(int) { return ""; }

}  // namespace pygpt

PYBIND11_MODULE(emulator, m) { pygpt::bind_cuda(m); }
