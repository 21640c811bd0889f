// Decoding: few queries, many keys.
#include "cpu/attention.h"

namespace pygpt::PYGPT_ISA_NAMESPACE {
namespace {

constexpr int64_t kDecodeKeys = 512;  // of one task; its softmax is merged with the others' after
constexpr int64_t kDecodeAhead = 32;  // rows; keys and values come from memory at its full rate

struct Partial {  // per task and row
  float max, sum;
};

PYGPT_INLINE F32 load_any(DType dtype, const char* p, int64_t d, int64_t dim) {
  return d + kLanes <= dim ? load_as_f32(dtype, p, d) : load_tail(dtype, p, d, dim - d);
}

// Keys [first, last) for all rows of a group: reads every key and value where it lies.
template <DType kType>
void decode_task(const Call& call, int64_t b, int64_t kv_head, int64_t first, int64_t last,
                 Partial* partials, float* outs) {
  const AttentionArgs& a = call.a;
  const Visible visible = call.visible(b);
  const int64_t k_row = a.k.row * call.element, v_row = a.v.row * call.element;
  const char* keys = call.at(a.k, b, first, kv_head);
  const char* values = call.at(a.v, b, first, kv_head);
  float scores[kDecodeKeys];
  for (int64_t r = 0; r < call.group * a.queries; ++r) {
    const int64_t i = r % a.queries;
    const Interval seen = within(visible.of_rows(i, i + 1), first, last);
    float* out = outs + r * call.pitch;
    partials[r] = {-INFINITY, 0.0f};
    if (seen.empty()) {
      std::memset(out, 0, call.pitch * sizeof(float));
      continue;
    }
    const char* q = call.at(a.q, b, i, kv_head * call.group + r / a.queries);
    const int64_t start = (seen.lo - first) / kLanes * kLanes, end = seen.hi - first;
    F32 highest = broadcast(-INFINITY);
    for (int64_t j = start; j < end; j += kLanes) {
      F32 dots[kLanes];
      for (int n = 0; n < kLanes; ++n) {  // keys past the end give what is masked
        if (r == 0) prefetch_row(kType, keys + (j + n + kDecodeAhead) * k_row, a.dim);
        const char* key = keys + min(j + n, end - 1) * k_row;
        F32 dot = broadcast(0.0f);
        for (int64_t d = 0; d < a.dim; d += kLanes) {
          dot = fma(load_any(kType, q, d, a.dim), load_any(kType, key, d, a.dim), dot);
        }
        dots[n] = dot;
      }
      transpose(dots);
      for (int half = kLanes / 2; half > 0; half /= 2) {
        for (int n = 0; n < half; ++n) dots[n] = dots[n] + dots[n + half];
      }
      store(scores + j, dots[0]);
      const Mask lanes = lanes_within(first + j, seen);
      highest = max(highest, select(lanes, dots[0], broadcast(-INFINITY)));
    }
    partials[r].max = max_lane(highest) * call.factor;
    const F32 f = broadcast(call.factor), shift = broadcast(-partials[r].max);
    F32 total = broadcast(0.0f);
    for (int64_t j = start; j < end; j += kLanes) {
      const F32 p = select(lanes_within(first + j, seen), exp2(fma(load(scores + j), f, shift)),
                           broadcast(0.0f));
      total = total + p;
      store(scores + j, p);
    }
    partials[r].sum = sum(total);
    for (int64_t d = 0; d < a.dim; d += 4 * kLanes) {
      F32 acc[4] = {broadcast(0.0f), broadcast(0.0f), broadcast(0.0f), broadcast(0.0f)};
      const int vecs = static_cast<int>(min(4, (call.pitch - d) / kLanes));
      if (d + 4 * kLanes <= a.dim) {
        for (int64_t j = seen.lo - first; j < end; ++j) {
          if (r == 0) prefetch_row(kType, values + (j + kDecodeAhead) * v_row, a.dim);
          const F32 p = broadcast(scores[j]);
          unroll<4>([&](auto n) PYGPT_LAMBDA {
            acc[n] = fma(p, load_as_f32(kType, values + j * v_row, d + n * kLanes), acc[n]);
          });
        }
        unroll<4>([&](auto n) PYGPT_LAMBDA { store(out + d + n * kLanes, acc[n]); });
      } else {
        for (int n = 0; n < vecs; ++n) {
          F32 total_v = broadcast(0.0f);
          for (int64_t j = seen.lo - first; j < end; ++j) {
            const F32 v = load_any(kType, values + j * v_row, d + n * kLanes, a.dim);
            total_v = fma(broadcast(scores[j]), v, total_v);
          }
          store(out + d + n * kLanes, total_v);
        }
      }
    }
  }
}

// The softmax over all pieces of one group's rows; the first piece's memory takes the result.
void merge_decoded(const Call& call, int64_t b, int64_t kv_head, int64_t pieces,
                   const Partial* partials, float* outs) {
  const AttentionArgs& a = call.a;
  const int64_t rows = call.group * a.queries;
  for (int64_t r = 0; r < rows; ++r) {
    float highest = -INFINITY, total = 0.0f;
    for (int64_t piece = 0; piece < pieces; ++piece) {
      const Partial& p = partials[piece * rows + r];
      if (p.sum != 0.0f && !(p.max <= highest)) highest = p.max;
    }
    float* merged = outs + r * call.pitch;
    for (int64_t piece = 0; piece < pieces; ++piece) {
      const Partial& p = partials[piece * rows + r];
      const F32 share = p.sum != 0.0f ? exp2(broadcast(p.max - highest)) : broadcast(0.0f);
      total += p.sum * first_lane(share);
      const float* part = outs + (piece * rows + r) * call.pitch;
      for (int64_t d = 0; d < call.pitch; d += kLanes) {
        const F32 scaled = load(part + d) * share;
        store(merged + d, piece == 0 ? scaled : load(merged + d) + scaled);
      }
    }
    const bool any = total != 0.0f;
    const int64_t i = r % a.queries, head = kv_head * call.group + r / a.queries;
    write_rows(a.dtype, merged, call.pitch, 1, a.dim, any ? 1.0f / total : 0.0f,
               call.at(a.out, b, i, head), 0);
    if (!a.lse) continue;
    a.lse[(b * a.heads + head) * a.queries + i] = any ? highest + log2f(total) : -INFINITY;
  }
}

}  // namespace

void decode(Call& call) {
  const AttentionArgs& a = call.a;
  const int64_t heads = a.batch * a.kv_heads, rows = call.group * a.queries;
  const int64_t pieces = (a.keys + kDecodeKeys - 1) / kDecodeKeys;
  Partial* partials = nullptr;
  float* outs = nullptr;
  const auto lay_out = [&](char* base) {
    Parts parts{base, lay_out_masks(a, base, call)};
    partials = parts.take<Partial>(heads * pieces * rows);
    outs = parts.take<float>(heads * pieces * rows * call.pitch);
    return parts.used;
  };
  lay_out(call_scratch(lay_out(nullptr)));
  const auto task = a.dtype == DType::kFloat32    ? decode_task<DType::kFloat32>
                    : a.dtype == DType::kBFloat16 ? decode_task<DType::kBFloat16>
                                                  : decode_task<DType::kFloat16>;
  run_tasks(heads * pieces, 2 * visible_pairs(call) * a.dim, [&](int64_t index) {
    const int64_t head = index / pieces, first = index % pieces * kDecodeKeys;
    task(call, head / a.kv_heads, head % a.kv_heads, first, min(a.keys, first + kDecodeKeys),
         partials + index * rows, outs + index * rows * call.pitch);
  });
  for (int64_t head = 0; head < heads; ++head) {
    merge_decoded(call, head / a.kv_heads, head % a.kv_heads, pieces,
                  partials + head * pieces * rows, outs + head * pieces * rows * call.pitch);
  }
}

}  // namespace pygpt::PYGPT_ISA_NAMESPACE
