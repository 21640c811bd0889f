// The product for few rows; gemm.cpp takes it where it fits.
#pragma once

#include "cpu/kernels.h"

namespace pygpt::PYGPT_ISA_NAMESPACE {

constexpr int64_t kFewRows = 16;

// Whether few_rows can make this product.
bool is_of_few_rows(const GemmArgs& g);
// Each element is summed in an order that depends on the depth and on how b lies, nothing else.
void few_rows(const GemmArgs& g);

}  // namespace pygpt::PYGPT_ISA_NAMESPACE
