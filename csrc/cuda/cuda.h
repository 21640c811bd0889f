// The CUDA side of the module. Built without nvcc, absent.cpp stands in.
#pragma once

#include <string>
#include <vector>

namespace pygpt {

struct CudaInfo {
  bool built = false;
  int runtime_version = 0;  // of the toolkit this module was built with, e.g. 13000
  int driver_version = 0;   // highest CUDA version that the installed driver supports, 0: no driver
  std::vector<std::string> devices;  // "NVIDIA H100 (sm_90)"
  std::string why_unusable;          // empty when the kernels can run here
};

CudaInfo cuda_info();

}  // namespace pygpt
