// The residual sum and the LayerNorm of it, which follow each other in every GPT: one visit of a
// row in place of an addition, two conversions and a normalisation, and nothing kept but the sum
// and two numbers a row. A row's sums are float32; those over rows are made for each of kTasks
// tasks and added up in their order, so that the number of threads does not matter.
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "core/parallel.h"
#include "core/scratch.h"
#include "cpu/element.h"

namespace pygpt::PYGPT_ISA_NAMESPACE {
namespace {

constexpr int64_t kTasks = 32;

template <class Body>  // body(i, n) for every vector, n the lanes in use
PYGPT_INLINE void each_vector(int64_t width, const Body& body) {
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) body(i, kLanes);
  if (i < width) body(i, width - i);
}

template <class D>
void forward(const AddNormArgs& a, int64_t r) {
  using T = typename D::Type;
  const int64_t at = r * a.width;
  const float* x = a.x + at;
  const T* branch = static_cast<const T*>(a.branch) + at;
  float* sums = a.sum + at;
  T* normed = static_cast<T*>(a.normed) + at;
  F32 total = broadcast(0.0f), squares = broadcast(0.0f);
  each_vector(a.width, [&](int64_t i, int64_t n) PYGPT_LAMBDA {
    const F32 s = read_up_to<Float>(x + i, n) + read_up_to<D>(branch + i, n);
    write_up_to<Float>(sums + i, s, n);
    total = total + s;
  });
  const float mean = sum(total) / static_cast<float>(a.width);
  const F32 centre = broadcast(mean);
  each_vector(a.width, [&](int64_t i, int64_t n) PYGPT_LAMBDA {
    const F32 d = read_up_to<Float>(sums + i, n) - centre;
    squares = select(first_lanes(static_cast<int>(n)), fma(d, d, squares), squares);
  });
  const float variance = sum(squares) / static_cast<float>(a.width);
  const float inverse = 1.0f / std::sqrt(variance + a.eps);
  const F32 scale = broadcast(inverse);
  each_vector(a.width, [&](int64_t i, int64_t n) PYGPT_LAMBDA {
    const F32 unit = (read_up_to<Float>(sums + i, n) - centre) * scale;
    const F32 y = fma(unit, read_up_to<Float>(a.weight + i, n), read_up_to<Float>(a.bias + i, n));
    write_up_to<D>(normed + i, y, n);
  });
  a.moments[2 * r] = mean;
  a.moments[2 * r + 1] = inverse;
}

// forward: u = (s - mean) / std, normed = u w + b. With g = dnormed w, the gradient of s is
// (g - mean(g) - u mean(g u)) / std, to which the sum's own is added; x and branch have the same.
template <class D>
void backward(const AddNormArgs& a, int64_t r, float* dweight, float* dbias) {
  using T = typename D::Type;
  const int64_t at = r * a.width;
  const float* sums = a.sum + at;
  const T* dnormed = static_cast<const T*>(a.dnormed) + at;
  const float* dsum = a.dsum ? a.dsum + at : nullptr;
  float* dx = a.dx + at;
  T* dbranch = a.dbranch ? static_cast<T*>(a.dbranch) + at : nullptr;
  const F32 centre = broadcast(a.moments[2 * r]), scale = broadcast(a.moments[2 * r + 1]);
  F32 of_g = broadcast(0.0f), of_gu = broadcast(0.0f);
  each_vector(a.width, [&](int64_t i, int64_t n) PYGPT_LAMBDA {
    const F32 d = read_up_to<D>(dnormed + i, n);
    const F32 u = (read_up_to<Float>(sums + i, n) - centre) * scale;
    const F32 g = d * read_up_to<Float>(a.weight + i, n);
    of_g = of_g + g;
    of_gu = fma(g, u, of_gu);
    write_up_to<Float>(dweight + i, fma(d, u, read_up_to<Float>(dweight + i, n)), n);
    write_up_to<Float>(dbias + i, read_up_to<Float>(dbias + i, n) + d, n);
  });
  const auto width = static_cast<float>(a.width);
  const F32 mean_g = broadcast(sum(of_g) / width), mean_gu = broadcast(sum(of_gu) / width);
  each_vector(a.width, [&](int64_t i, int64_t n) PYGPT_LAMBDA {
    const F32 u = (read_up_to<Float>(sums + i, n) - centre) * scale;
    const F32 g = read_up_to<D>(dnormed + i, n) * read_up_to<Float>(a.weight + i, n);
    F32 y = scale * (g - mean_g - u * mean_gu);
    if (dsum) y = y + read_up_to<Float>(dsum + i, n);
    write_up_to<Float>(dx + i, y, n);
    if (dbranch) write_up_to<D>(dbranch + i, y, n);
  });
}

template <class D>
void rows(const AddNormArgs& a) {
  const auto begin = [&](int64_t task) { return task * a.rows / kTasks; };
  if (!a.dnormed) {
    parallel_tasks(kTasks, [&](int64_t task, int) {
      for (int64_t r = begin(task); r < begin(task + 1); ++r) forward<D>(a, r);
    });
    return;
  }
  auto* parts = reinterpret_cast<float*>(call_scratch(kTasks * 2 * a.width * sizeof(float)));
  parallel_tasks(kTasks, [&](int64_t task, int) {
    float* dweight = parts + task * 2 * a.width;
    std::fill_n(dweight, 2 * a.width, 0.0f);
    for (int64_t r = begin(task); r < begin(task + 1); ++r) {
      backward<D>(a, r, dweight, dweight + a.width);
    }
  });
  std::fill_n(a.dweight, a.width, 0.0f);
  std::fill_n(a.dbias, a.width, 0.0f);
  for (int64_t task = 0; task < kTasks; ++task) {
    const float* part = parts + task * 2 * a.width;
    for (int64_t i = 0; i < a.width; ++i) a.dweight[i] += part[i];
    for (int64_t i = 0; i < a.width; ++i) a.dbias[i] += part[a.width + i];
  }
}

}  // namespace

void add_norm(const AddNormArgs& a) {
  switch (a.dtype) {
    case DType::kFloat32:
      return rows<Float>(a);
    case DType::kBFloat16:
      return rows<BFloat>(a);
    case DType::kFloat16:
      return rows<Half>(a);
  }
}

}  // namespace pygpt::PYGPT_ISA_NAMESPACE
