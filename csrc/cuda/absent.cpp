// Instead of every .cu where the module is built without nvcc.
#include "core/error.h"
#include "cuda/cuda.h"

namespace pygpt {
namespace {

constexpr const char* kWhy = "built without CUDA: install with PYGPT_CUDA=ON where nvcc is";

[[noreturn]] void absent() { throw UserError(kWhy); }

}  // namespace

CudaInfo cuda_info() {
  CudaInfo info;
  info.why_unusable = kWhy;
  return info;
}

std::string cuda_problem(int) { return kWhy; }

void cuda_attention_forward(const CudaAttention&, const CudaLaunch&) { absent(); }
void cuda_attention_backward(const CudaAttention&, const CudaAttentionGradient&,
                             const CudaLaunch&) {
  absent();
}
int32_t cuda_attention_splits(const CudaAttention&, const CudaLaunch&) { absent(); }
void cuda_attention_decode(const CudaAttention&, int32_t, float*, const CudaLaunch&) { absent(); }
void cuda_sample(const SampleArgs&, const SampleParameters&, int32_t*, const CudaLaunch&) {
  absent();
}
void cuda_cross_entropy(const CudaCrossEntropy&, const CudaLaunch&) { absent(); }

}  // namespace pygpt
