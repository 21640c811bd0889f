// The kernels that the tokenizer needs, without choosing an instruction set at run time.
#include "core/isa.h"

namespace pygpt {

namespace PYGPT_ISA_NAMESPACE {
void byte_classes(const uint8_t* text, int64_t blocks, ByteClasses* out);
}

const CpuKernels& cpu_kernels() {
  static const CpuKernels kernels = [] {
    CpuKernels k{};
    k.byte_classes = PYGPT_ISA_NAMESPACE::byte_classes;
    return k;
  }();
  return kernels;
}

}  // namespace pygpt
