// How a kernel that computes in float32 reads and writes each element type.
#pragma once

#include "cpu/kernels.h"
#include "cpu/vec.h"

namespace pygpt::PYGPT_ISA_NAMESPACE {

struct Float {
  using Type = float;
  static PYGPT_INLINE F32 read(const float* p) { return load(p); }
  static PYGPT_INLINE void write(float* p, F32 x) { store(p, x); }
};
struct BFloat {
  using Type = uint16_t;
  static PYGPT_INLINE F32 read(const uint16_t* p) { return load_bf16(p); }
  static PYGPT_INLINE void write(uint16_t* p, F32 x) { store_bf16(p, x); }
};
struct Half {
  using Type = uint16_t;
  static PYGPT_INLINE F32 read(const uint16_t* p) { return load_f16(p); }
  static PYGPT_INLINE void write(uint16_t* p, F32 x) { store_f16(p, x); }
};

}  // namespace pygpt::PYGPT_ISA_NAMESPACE
