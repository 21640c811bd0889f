// Which instruction set the CPU kernels use, chosen once when the module is imported.
#pragma once

#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace pygpt {

// Names in order of preference, best first, of the sets that this build has and this CPU can run.
std::vector<std::string> available_isas();

// The one in use: PYGPT_ISA where set (std::invalid_argument if unknown or unavailable), else the
// best.
const std::string& current_isa();

// Its kernels.
const CpuKernels& cpu_kernels();

}  // namespace pygpt
