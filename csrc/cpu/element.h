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

// The first n numbers, then zeros.
template <class D>
PYGPT_INLINE F32 read_up_to(const typename D::Type* p, int64_t n) {
  if (n >= kLanes) return D::read(p);
  typename D::Type copy[kLanes] = {};
  for (int i = 0; i < n; ++i) copy[i] = p[i];
  return D::read(copy);
}
template <>
PYGPT_INLINE F32 read_up_to<Float>(const float* p, int64_t n) {
  return n >= kLanes ? load(p) : load_first(p, static_cast<int>(n < 0 ? 0 : n));
}
template <class D>
PYGPT_INLINE void write_up_to(typename D::Type* p, F32 x, int64_t n) {
  if (n >= kLanes) return D::write(p, x);
  typename D::Type copy[kLanes];
  D::write(copy, x);
  for (int i = 0; i < n; ++i) p[i] = copy[i];
}

}  // namespace pygpt::PYGPT_ISA_NAMESPACE
