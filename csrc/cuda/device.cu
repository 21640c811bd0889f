#include "cuda/cuda.h"
#include "cuda/ptx.cuh"

namespace pygpt {
namespace {

__global__ void nothing() {}

}  // namespace

CudaInfo cuda_info() {
  CudaInfo info;
  info.built = true;
  cudaRuntimeGetVersion(&info.runtime_version);
  cudaDriverGetVersion(&info.driver_version);
  if (info.driver_version == 0) {
    info.why_unusable = "no NVIDIA driver";
    return info;
  }
  if (info.driver_version / 1000 < info.runtime_version / 1000) {
    info.why_unusable = "the driver supports CUDA " + std::to_string(info.driver_version / 1000) +
                        ", this build needs " + std::to_string(info.runtime_version / 1000) +
                        ": update the driver";
    return info;
  }
  int count = 0;
  if (const cudaError_t error = cudaGetDeviceCount(&count); error != cudaSuccess || count == 0) {
    info.why_unusable = count == 0 ? "no NVIDIA GPU" : cudaGetErrorString(error);
    cudaGetLastError();
    return info;
  }
  for (int device = 0; device < count; ++device) {
    cudaDeviceProp properties;
    if (cudaGetDeviceProperties(&properties, device) != cudaSuccess) continue;
    info.devices.push_back(std::string(properties.name) + " (sm_" +
                           std::to_string(properties.major * 10 + properties.minor) + ")");
  }
  return info;
}

std::string cuda_problem(int device) {
  try {
    const OnDevice there(device);
    cudaFuncAttributes attributes;
    check(cudaFuncGetAttributes(&attributes, nothing));
    return "";
  } catch (const UserError& error) {
    return std::string(error.what()) + "; install pygpt again on this machine";
  }
}

}  // namespace pygpt
