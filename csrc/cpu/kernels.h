// What every instruction set offers: plain structs in, nothing allocated for the caller, no Python.
// To add a kernel: its argument struct and an entry here, its code in a .cpp of this folder inside
// namespace pygpt::PYGPT_ISA_NAMESPACE, its name in the table of kernels.cpp, its binding.
#pragma once

#include <cstdint>

namespace pygpt {

enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

struct CpuKernels {
  const char* name;
};

}  // namespace pygpt
