// The table of this instruction set; compiled once per set.
#include "cpu/kernels.h"

#define PYGPT_STRINGIFY(x) #x
#define PYGPT_NAME(x) PYGPT_STRINGIFY(x)

namespace pygpt::PYGPT_ISA_NAMESPACE {

void sample(const SampleArgs&);
void cross_entropy(const CrossEntropyArgs&);

extern const CpuKernels kernels;
const CpuKernels kernels = {
    .name = PYGPT_NAME(PYGPT_ISA_NAMESPACE),
    .sample = sample,
    .cross_entropy = cross_entropy,
};

}  // namespace pygpt::PYGPT_ISA_NAMESPACE
