// The table of this instruction set; compiled once per set.
#include "cpu/kernels.h"

#define PYGPT_STRINGIFY(x) #x
#define PYGPT_NAME(x) PYGPT_STRINGIFY(x)

namespace pygpt::PYGPT_ISA_NAMESPACE {

void sample(const SampleArgs&);
void cross_entropy(const CrossEntropyArgs&);
void attention_forward(const AttentionArgs&);
void attention_backward(const AttentionArgs&);
void gemm(const GemmArgs&);
void byte_classes(const uint8_t* text, int64_t blocks, ByteClasses* out);
void gelu(const GeluArgs&);
void add_norm(const AddNormArgs&);
uint32_t crc32c(const uint8_t* data, int64_t size);

extern const CpuKernels kernels;
const CpuKernels kernels = {
    .name = PYGPT_NAME(PYGPT_ISA_NAMESPACE),
    .sample = sample,
    .cross_entropy = cross_entropy,
    .attention_forward = attention_forward,
    .attention_backward = attention_backward,
    .gemm = gemm,
    .byte_classes = byte_classes,
    .gelu = gelu,
    .add_norm = add_norm,
    .crc32c = crc32c,
};

}  // namespace pygpt::PYGPT_ISA_NAMESPACE
