#include "core/isa.h"

#include <cstdlib>
#include <stdexcept>

namespace pygpt {

namespace scalar {
extern const CpuKernels kernels;
}
#ifdef PYGPT_X86
namespace avx2 {
extern const CpuKernels kernels;
}
namespace avx512 {
extern const CpuKernels kernels;
}
namespace avx512_bf16 {
extern const CpuKernels kernels;
}
#endif

namespace {

struct Isa {
  const char* name;
  const CpuKernels* kernels;
  bool (*runs_here)();
};

#ifdef PYGPT_X86
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512cd");
}
bool has_avx512_bf16() {
  return has_avx512() && __builtin_cpu_supports("avx512bf16") &&
         __builtin_cpu_supports("avx512vnni");
}
#endif

// Best first.
const Isa kIsas[] = {
#ifdef PYGPT_X86
    {"avx512_bf16", &avx512_bf16::kernels, has_avx512_bf16},
    {"avx512", &avx512::kernels, has_avx512},
    {"avx2", &avx2::kernels, has_avx2},
#endif
    {"scalar", &scalar::kernels, [] { return true; }},
};

struct Choice {
  std::string name;
  const CpuKernels* kernels;
};

Choice choose() {
  const char* wanted = std::getenv("PYGPT_ISA");
  std::string available;
  for (const Isa& isa : kIsas) {
    if (!isa.runs_here()) continue;
    if (!wanted || !*wanted || std::string(wanted) == isa.name) return {isa.name, isa.kernels};
    available += available.empty() ? isa.name : std::string(", ") + isa.name;
  }
  throw std::invalid_argument("PYGPT_ISA is '" + std::string(wanted) +
                              "', which this build or CPU does not have; available: " + available);
}

const Choice& choice() {
  static const Choice chosen = choose();
  return chosen;
}

}  // namespace

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : kIsas) {
    if (isa.runs_here()) names.emplace_back(isa.name);
  }
  return names;
}

const std::string& current_isa() { return choice().name; }

const CpuKernels& cpu_kernels() { return *choice().kernels; }

}  // namespace pygpt
