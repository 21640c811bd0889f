#include "cuda/cuda.h"

namespace pygpt {

CudaInfo cuda_info() {
  CudaInfo info;
  info.why_unusable = "built without CUDA: install with PYGPT_CUDA=ON where nvcc is";
  return info;
}

}  // namespace pygpt
