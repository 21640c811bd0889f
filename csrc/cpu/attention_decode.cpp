// Decoding: few queries, many keys.
//
// What takes the time is reading keys and values, so they are read in the order in which they lie:
// where the heads of a key are neighbours a task has all heads, and each reads a few keys before
// any goes on; where each head has a place of its own a task has one head.
#include "cpu/attention.h"

namespace pygpt::PYGPT_ISA_NAMESPACE {
namespace {

constexpr int kFewKeys = 4;            // and values: what a head reads before the next one goes on
constexpr int64_t kFewValues = 16;     // (fewer would load and store its sums too often)
constexpr int64_t kStep = 2 * kLanes;  // elements
static_assert(kLanes % kFewKeys == 0);
template <DType kType>
constexpr int64_t kStepBytes = kStep * (kType == DType::kFloat32 ? 4 : 2);

struct Partial {  // per task and row
  float max, sum;
};

// The first kStep elements of a row as floats, zeros from `count` on. bf16 comes out as those of
// even and those of odd index, which costs two instructions in place of four.
template <DType kType>
PYGPT_INLINE void load_step(const char* row, int64_t count, F32 (&x)[2]) {
  if constexpr (kType == DType::kBFloat16) {
    const float* words = reinterpret_cast<const float*>(row);
    const F32 pairs = count >= kStep ? load(words) : load_first(words, static_cast<int>(count / 2));
    x[0] = as_f32(shift_left<16>(as_i32(pairs)));
    x[1] = as_f32(as_i32(pairs) & broadcast(static_cast<int32_t>(0xffff0000)));
  } else {
    for (int i = 0; i < 2; ++i, count -= kLanes) {
      x[i] = count >= kLanes ? load_as_f32(kType, row, i * kLanes)
             : count > 0     ? load_tail(kType, row, i * kLanes, count)
                             : broadcast(0.0f);
    }
  }
}

struct DecodeRow {  // a query
  const char *q, *keys, *values;
  Interval seen;  // counted from the task's first key
  bool leads;     // is its head's first: asks for keys and values ahead
  Partial* partial;
  float* out;
};

struct DecodeTask {
  const Call& call;
  int64_t count;       // of keys
  int64_t few, ahead;  // values that a row reads in one go; rows asked for before they are read
  int64_t rows;
  int64_t pitch, score_pitch;
  DecodeRow* row;
  float *queries, *scores;  // of all rows
  float* products;          // of all rows with kLanes keys, before their lanes are summed
};

// The products of a query with kFewKeys keys, a vector each whose lanes are still to be summed;
// those past `last` give what is masked.
template <DType kType>
PYGPT_INLINE void multiply_keys(const float* q, const char* keys, int64_t stride, int64_t last,
                                int64_t dim, int64_t ahead, float* products) {
  const char* key[kFewKeys];
  F32 product[kFewKeys];
  unroll<kFewKeys>([&](auto i) PYGPT_LAMBDA {
    if (ahead) prefetch_row(kType, keys + (i + ahead) * stride, dim);
    key[i] = keys + min(i, last) * stride;
    product[i] = broadcast(0.0f);
  });
  const auto add = [&](int64_t d, int64_t count) PYGPT_LAMBDA {
    const F32 first = load(q + d), second = load(q + d + kLanes);
    unroll<kFewKeys>([&](auto i) PYGPT_LAMBDA {
      F32 x[2];
      load_step<kType>(key[i], count, x);
      product[i] = fma(second, x[1], fma(first, x[0], product[i]));
      key[i] += kStepBytes<kType>;
    });
  };
  int64_t d = 0;
  for (; d + kStep <= dim; d += kStep) add(d, kStep);
  if (d < dim) add(d, dim - d);
  unroll<kFewKeys>([&](auto i) PYGPT_LAMBDA { store(products + i * kLanes, product[i]); });
}

// out += weights * values over `count` rows.
template <DType kType>
PYGPT_INLINE void add_values(const float* weights, const char* values, int64_t stride,
                             int64_t count, int64_t dim, int64_t ahead, float* out) {
  const auto add = [&](auto steps, int64_t d, int64_t left) PYGPT_LAMBDA {
    F32 total[steps * 2];
    unroll<steps * 2>([&](auto i) PYGPT_LAMBDA { total[i] = load(out + d + i * kLanes); });
    const char* row = values + d / kStep * kStepBytes<kType>;
    for (int64_t j = 0; j < count; ++j, row += stride) {
      if (ahead && d == 0) prefetch_row(kType, row + ahead * stride, dim);
      const F32 p = broadcast(weights[j]);
      unroll<steps>([&](auto i) PYGPT_LAMBDA {
        F32 x[2];
        load_step<kType>(row + i * kStepBytes<kType>, left, x);
        total[2 * i] = fma(p, x[0], total[2 * i]);
        total[2 * i + 1] = fma(p, x[1], total[2 * i + 1]);
      });
    }
    unroll<steps * 2>([&](auto i) PYGPT_LAMBDA { store(out + d + i * kLanes, total[i]); });
  };
  int64_t d = 0;
  for (; d + 2 * kStep <= dim; d += 2 * kStep) add(std::integral_constant<int, 2>(), d, kStep);
  for (; d < dim; d += kStep) add(std::integral_constant<int, 1>(), d, dim - d);
}

template <DType kType>
void decode_task(const DecodeTask& t) {
  const AttentionArgs& a = t.call.a;
  const int64_t k_row = a.k.row * t.call.element, v_row = a.v.row * t.call.element;
  for (int64_t r = 0; r < t.rows; ++r) {
    for (int64_t d = 0; d < a.dim; d += kStep) {
      F32 x[2];
      load_step<kType>(t.row[r].q + d * t.call.element, a.dim - d, x);
      store(t.queries + r * t.pitch + d, x[0]);
      store(t.queries + r * t.pitch + d + kLanes, x[1]);
    }
    std::memset(t.row[r].out, 0, t.pitch * sizeof(float));
  }
  for (int64_t j = 0; j < t.count; j += kLanes) {
    const auto sees = [&](const DecodeRow& row)
                          PYGPT_LAMBDA { return j < row.seen.hi && j + kLanes > row.seen.lo; };
    for (int64_t i = j; i < j + kLanes; i += kFewKeys) {
      for (int64_t r = 0; r < t.rows; ++r) {
        const DecodeRow& row = t.row[r];
        if (!sees(row)) continue;
        multiply_keys<kType>(t.queries + r * t.pitch, row.keys + i * k_row, k_row,
                             row.seen.hi - 1 - i, a.dim, row.leads ? t.ahead : 0,
                             t.products + (r * kLanes + i - j) * kLanes);
      }
    }
    for (int64_t r = 0; r < t.rows; ++r) {
      if (!sees(t.row[r])) continue;
      F32 lines[kLanes];
      for (int i = 0; i < kLanes; ++i) lines[i] = load(t.products + (r * kLanes + i) * kLanes);
      store(t.scores + r * t.score_pitch + j, sums(lines));
    }
  }
  for (int64_t r = 0; r < t.rows; ++r) {
    const Interval seen = t.row[r].seen;
    float* scores = t.scores + r * t.score_pitch;
    const F32 lowest = broadcast(-INFINITY), zero = broadcast(0.0f);
    F32 highest = lowest, total = zero;
    const int64_t start = seen.lo / kLanes * kLanes;
    for (int64_t n = start; n < seen.hi; n += kLanes) {
      highest = max(highest, select(lanes_within(n, seen), load(scores + n), lowest));
    }
    const float shift = max_lane(highest) * t.call.factor;
    for (int64_t n = start; n < seen.hi; n += kLanes) {
      const F32 x = fma(load(scores + n), broadcast(t.call.factor), broadcast(-shift));
      const F32 p = select(lanes_within(n, seen), exp2(x), zero);
      total = total + p;
      store(scores + n, p);
    }
    *t.row[r].partial = seen.empty() ? Partial{-INFINITY, 0.0f} : Partial{shift, sum(total)};
  }
  for (int64_t j = 0; j < t.count; j += t.few) {
    for (int64_t r = 0; r < t.rows; ++r) {
      const DecodeRow& row = t.row[r];
      const Interval part = within(row.seen, j, j + t.few);
      if (part.empty()) continue;
      add_values<kType>(t.scores + r * t.score_pitch + part.lo, row.values + part.lo * v_row, v_row,
                        part.hi - part.lo, a.dim, row.leads ? t.ahead : 0, row.out);
    }
  }
}

// The softmax over all pieces of one group's rows; the first piece's memory takes the result.
void merge_decoded(const Call& call, int64_t b, int64_t kv_head, int64_t pieces,
                   const Partial* partials, float* outs, int64_t pitch) {
  const AttentionArgs& a = call.a;
  const int64_t rows = call.group * a.queries;
  for (int64_t r = 0; r < rows; ++r) {
    float highest = -INFINITY, total = 0.0f;
    for (int64_t piece = 0; piece < pieces; ++piece) {
      const Partial& p = partials[piece * rows + r];
      if (p.sum != 0.0f && !(p.max <= highest)) highest = p.max;
    }
    float* merged = outs + r * pitch;
    for (int64_t piece = 0; piece < pieces; ++piece) {
      const Partial& p = partials[piece * rows + r];
      const F32 share = p.sum != 0.0f ? exp2(broadcast(p.max - highest)) : broadcast(0.0f);
      total += p.sum * first_lane(share);
      const float* part = outs + (piece * rows + r) * pitch;
      for (int64_t d = 0; d < pitch; d += kLanes) {
        const F32 scaled = load(part + d) * share;
        store(merged + d, piece == 0 ? scaled : load(merged + d) + scaled);
      }
    }
    if (a.dtype == DType::kBFloat16) {
      for (int64_t d = 0; d < a.dim; d += kStep) interleave(merged + d);
    }
    const bool any = total != 0.0f;
    const int64_t i = r % a.queries, head = kv_head * call.group + r / a.queries;
    write_rows(a.dtype, merged, pitch, 1, a.dim, any ? 1.0f / total : 0.0f,
               call.at(a.out, b, i, head), 0);
    if (!a.lse) continue;
    a.lse[(b * a.heads + head) * a.queries + i] = any ? highest + log2f(total) : -INFINITY;
  }
}

}  // namespace

void decode(Call& call) {
  const AttentionArgs& a = call.a;
  const int64_t rows = call.group * a.queries, pitch = round_up(a.dim, kStep);
  const bool neighbours = max(a.k.head, a.v.head) < min(a.k.row, a.v.row);
  const int64_t heads = neighbours ? a.kv_heads : 1;
  // Keys of a task; its softmax is merged with the others' afterwards.
  const int64_t piece = neighbours ? 128 : 512;
  const int64_t pieces = (a.keys + piece - 1) / piece;
  const int64_t groups = a.batch * a.kv_heads / heads;
  Partial* partials = nullptr;
  float* outs = nullptr;
  const auto lay_out = [&](char* base) {
    Parts parts{base, lay_out_masks(a, base, call)};
    partials = parts.take<Partial>(groups * heads * pieces * rows);
    outs = parts.take<float>(groups * heads * pieces * rows * pitch);
    return parts.used;
  };
  lay_out(call_scratch(lay_out(nullptr)));
  const auto run = a.dtype == DType::kFloat32    ? decode_task<DType::kFloat32>
                   : a.dtype == DType::kBFloat16 ? decode_task<DType::kBFloat16>
                                                 : decode_task<DType::kFloat16>;
  run_tasks(groups * pieces, 2 * visible_pairs(call) * a.dim, [&](int64_t index) {
    const int64_t first = index % pieces * piece, count = min(piece, a.keys - first);
    DecodeTask task{.call = call,
                    .count = count,
                    .few = neighbours ? kFewValues : count,
                    .ahead = neighbours ? 8 : 32,
                    .rows = heads * rows,
                    .pitch = pitch,
                    .score_pitch = piece + kPad,
                    .row = nullptr,
                    .queries = nullptr,
                    .scores = nullptr,
                    .products = nullptr};
    const auto lay_out_task = [&](char* base) {
      Parts parts{base};
      task.row = parts.take<DecodeRow>(task.rows);
      task.queries = parts.take<float>(task.rows * pitch);
      task.scores = parts.take<float>(task.rows * task.score_pitch);
      task.products = parts.take<float>(task.rows * kLanes * kLanes);
      return parts.used;
    };
    lay_out_task(task_scratch(lay_out_task(nullptr)));
    for (int64_t r = 0; r < task.rows; ++r) {
      const int64_t kv_head = index / pieces * heads + r / rows, b = kv_head / a.kv_heads;
      const int64_t h = kv_head % a.kv_heads, i = r % a.queries;
      const int64_t place = (kv_head * pieces + index % pieces) * rows + r % rows;
      const Interval seen = within(call.visible(b).of_rows(i, i + 1), first, first + count);
      task.row[r] = {.q = call.at(a.q, b, i, h * call.group + r % rows / a.queries),
                     .keys = call.at(a.k, b, first, h),
                     .values = call.at(a.v, b, first, h),
                     .seen = {seen.lo - first, seen.hi - first},
                     .leads = r % rows == 0,
                     .partial = partials + place,
                     .out = outs + place * pitch};
    }
    run(task);
  });
  for (int64_t head = 0; head < groups * heads; ++head) {
    merge_decoded(call, head / a.kv_heads, head % a.kv_heads, pieces,
                  partials + head * pieces * rows, outs + head * pieces * rows * pitch, pitch);
  }
}

}  // namespace pygpt::PYGPT_ISA_NAMESPACE
