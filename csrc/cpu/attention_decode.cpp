// Few queries: decoding, and its backward.
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
constexpr int64_t kProducts = kLanes / kFewKeys * kLanes;  // floats, for kLanes keys
static_assert(kFewKeys == 4);                              // as in partial_sums
template <DType kType>  // rows are multiplied as they lie, two bf16 at a time
constexpr bool kInWords = kHasPairs && kType == DType::kBFloat16;
template <DType kType>
constexpr int64_t kStepBytes = kStep * (kType == DType::kFloat32 ? 4 : 2);

constexpr int64_t kRowCost = 1000;  // of a query in a task, in multiply_adds

struct Partial {  // per task and row
  float max, sum;
};

// The first `count` bf16 of a row, kStep at most, as words; zeros behind them.
PYGPT_INLINE F32 load_words(const char* row, int64_t count) {
  const float* words = reinterpret_cast<const float*>(row);
  return count >= kStep ? load(words) : load_first(words, static_cast<int>(count / 2));
}
// The same of any dtype as floats. bf16 comes out as those of even and those of odd index, which
// costs two instructions in place of four.
template <DType kType>
PYGPT_INLINE void load_step(const char* row, int64_t count, F32 (&x)[2]) {
  if constexpr (kType == DType::kBFloat16) {
    const F32 words = load_words(row, count);
    x[0] = as_f32(shift_left<16>(as_i32(words)));
    x[1] = as_f32(as_i32(words) & broadcast(static_cast<int32_t>(0xffff0000)));
  } else {
    for (int i = 0; i < 2; ++i, count -= kLanes) {
      x[i] = count >= kLanes ? load_as_f32(kType, row, i * kLanes)
             : count > 0     ? load_tail(kType, row, i * kLanes, count)
                             : broadcast(0.0f);
    }
  }
}

// The first `count` elements of a row from what load_step makes of them.
template <DType kType>
PYGPT_INLINE void store_step(char* row, int64_t count, F32 (&x)[2]) {
  if constexpr (kType == DType::kBFloat16) {
    float* words = reinterpret_cast<float*>(row);
    const F32 pairs = pair_bf16(x[0], x[1]);
    count >= kStep ? store(words, pairs) : store_first(words, pairs, static_cast<int>(count / 2));
  } else {
    for (int i = 0; i < 2; ++i, count -= kLanes) {
      if (count >= kLanes) {
        store_as(kType, row, i * kLanes, x[i]);
      } else if (count > 0) {
        store_tail(kType, row, i * kLanes, count, x[i]);
      }
    }
  }
}

// A row of kStep-padded floats in the order of load_step.
template <DType kType>
PYGPT_INLINE void load_steps(const char* row, int64_t dim, float* out) {
  for (int64_t d = 0; d < dim; d += kStep, row += kStepBytes<kType>) {
    F32 x[2];
    load_step<kType>(row, dim - d, x);
    store(out + d, x[0]);
    store(out + d + kLanes, x[1]);
  }
}

struct DecodeRow {  // a query
  int64_t b, head, query;
  const char *q, *keys, *values;
  const char* dout;  // of the backward
  Interval seen;     // counted from the task's first key
  bool leads;        // is its head's first: asks for keys and values ahead
  int64_t place;     // of what the task finds out about it
};

// How a call is cut into tasks: a piece of the keys, for one head or for all.
struct Plan {
  const Call& call;
  int64_t rows;   // that share a head of keys
  int64_t heads;  // of keys in a task
  int64_t piece, pieces;
  int64_t few, ahead;  // values that a row reads in one go; rows asked for before they are read
  int64_t pitch;

  int64_t tasks() const { return call.a.batch * call.a.kv_heads / heads * pieces; }
  int64_t places() const { return call.a.batch * call.a.kv_heads * pieces * rows; }
};

Plan plan(const Call& call) {
  const AttentionArgs& a = call.a;
  const bool neighbours = max(a.k.head, a.v.head) < min(a.k.row, a.v.row);
  const int64_t piece = neighbours ? 128 : 512;
  return {.call = call,
          .rows = call.group * a.queries,
          .heads = neighbours ? a.kv_heads : 1,
          .piece = piece,
          .pieces = (a.keys + piece - 1) / piece,
          .few = neighbours ? kFewValues : piece,
          .ahead = neighbours ? 24 : 48,
          .pitch = round_up(a.dim, kStep)};
}

struct DecodeTask {
  int64_t first, count;  // of keys
  int64_t rows;
  DecodeRow* row;
  float *queries, *scores;  // of all rows
  float* products;          // of all rows with kLanes keys, before their lanes are summed
  // The backward alone has what follows: of all rows, and of all rows with kLanes keys.
  float *douts, *deltas;
  float *value_products, *weights;
};

DecodeTask lay_out_task(const Plan& p, int64_t index, int64_t score_pitch, bool backward) {
  const AttentionArgs& a = p.call.a;
  DecodeTask t{};
  t.first = index % p.pieces * p.piece;
  t.count = min(p.piece, a.keys - t.first);
  t.rows = p.heads * p.rows;
  const auto lay_out = [&](char* base) {
    Parts parts{base};
    t.row = parts.take<DecodeRow>(t.rows);
    t.queries = parts.take<float>(t.rows * p.pitch);
    t.scores = parts.take<float>(t.rows * score_pitch);
    t.products = parts.take<float>(t.rows * kProducts);
    if (backward) {
      t.douts = parts.take<float>(t.rows * p.pitch);
      t.deltas = parts.take<float>(t.rows);
      t.value_products = parts.take<float>(t.rows * kProducts);
      t.weights = parts.take<float>(t.rows * kLanes);
    }
    return parts.used;
  };
  lay_out(task_scratch(lay_out(nullptr)));
  for (int64_t r = 0; r < t.rows; ++r) {
    const int64_t kv_head = index / p.pieces * p.heads + r / p.rows, b = kv_head / a.kv_heads;
    const int64_t h = kv_head % a.kv_heads, i = r % a.queries;
    const int64_t head = h * p.call.group + r % p.rows / a.queries;
    const Interval seen = within(p.call.visible(b).of_rows(i, i + 1), t.first, t.first + t.count);
    t.row[r] = {.b = b,
                .head = head,
                .query = i,
                .q = p.call.at(a.q, b, i, head),
                .keys = p.call.at(a.k, b, t.first, h),
                .values = p.call.at(a.v, b, t.first, h),
                .dout = backward ? p.call.at(a.dout, b, i, head) : nullptr,
                .seen = {seen.lo - t.first, seen.hi - t.first},
                .leads = r % p.rows == 0,
                .place = (kv_head * p.pieces + index % p.pieces) * p.rows + r % p.rows};
  }
  return t;
}

// Whether a row sees any of the keys [first, first + count).
PYGPT_INLINE bool sees(const DecodeRow& row, int64_t first, int64_t count) {
  return first < row.seen.hi && first + count > row.seen.lo;
}

struct Ahead {  // rows asked for before they are read, into the second cache: the first is too slow
  const char* rows;
  int64_t stride;

  template <DType kType>
  PYGPT_INLINE void ask(int64_t i, int64_t dim) const {
    if (rows) prefetch_row<2>(kType, rows + i * stride, dim);
  }
};

// The products of a query with kFewKeys keys as partial_sums; those past `last` give what is
// masked. `q` is the query from load_steps, `words` as it lies.
template <DType kType>
PYGPT_INLINE void multiply_keys(const float* q, const char* words, const char* keys, int64_t stride,
                                int64_t last, int64_t dim, Ahead ahead, float* products) {
  const char* key[kFewKeys];
  F32 product[kFewKeys];
  unroll<kFewKeys>([&](auto i) PYGPT_LAMBDA {
    ahead.ask<kType>(i, dim);
    key[i] = keys + min(i, last) * stride;
    product[i] = broadcast(0.0f);
  });
  const auto add = [&](int64_t d, int64_t count) PYGPT_LAMBDA {
    F32 query[2];
    if constexpr (kInWords<kType>) {
      query[0] = load_words(words + d / kStep * kStepBytes<kType>, count);
    } else {
      query[0] = load(q + d), query[1] = load(q + d + kLanes);
    }
    unroll<kFewKeys>([&](auto i) PYGPT_LAMBDA {
      if constexpr (kInWords<kType>) {
        product[i] = multiply_add<true>(query[0], load_words(key[i], count), product[i]);
      } else {
        F32 x[2];
        load_step<kType>(key[i], count, x);
        product[i] = fma(query[1], x[1], fma(query[0], x[0], product[i]));
      }
      key[i] += kStepBytes<kType>;
    });
  };
  int64_t d = 0;
  for (; d + kStep <= dim; d += kStep) add(d, kStep);
  if (d < dim) add(d, dim - d);
  store(products, partial_sums(product));
}

// out += weights * values over `count` rows.
template <DType kType>
PYGPT_INLINE void add_values(const float* weights, const char* values, int64_t stride,
                             int64_t count, int64_t dim, Ahead ahead, float* out) {
  const auto add = [&](auto steps, int64_t d, int64_t left) PYGPT_LAMBDA {
    F32 total[steps * 2];
    unroll<steps * 2>([&](auto i) PYGPT_LAMBDA { total[i] = load(out + d + i * kLanes); });
    const char* row = values + d / kStep * kStepBytes<kType>;
    for (int64_t j = 0; j < count; ++j, row += stride) {
      if (d == 0) ahead.ask<kType>(j, dim);
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

// The products of a query with kLanes keys.
PYGPT_INLINE F32 join_products(const float* products) {
  F32 parts[kLanes / kFewKeys];
  for (int i = 0; i < kLanes / kFewKeys; ++i) parts[i] = load(products + i * kLanes);
  return join_sums(parts);
}

template <DType kType>
void decode_task(const Plan& p, int64_t index, Partial* partials, float* outs) {
  const Call& call = p.call;
  const AttentionArgs& a = call.a;
  const int64_t k_row = a.k.row * call.element, v_row = a.v.row * call.element;
  const int64_t score_pitch = p.piece + kPad;
  const DecodeTask t = lay_out_task(p, index, score_pitch, false);
  // What comes p.ahead rows after row n of the task, which reads its keys, then its values; the
  // keys of the next piece follow.
  const auto ahead = [&](const DecodeRow& row, int64_t n) PYGPT_LAMBDA {
    n += p.ahead;
    if (!row.leads) return Ahead{nullptr, 0};
    if (n < t.count) return Ahead{row.keys + n * k_row, k_row};
    n -= t.count;
    if (n < t.count) return Ahead{row.values + n * v_row, v_row};
    return Ahead{t.first + n < a.keys ? row.keys + n * k_row : nullptr, k_row};
  };
  for (int64_t r = 0; r < t.rows; ++r) {
    const DecodeRow& row = t.row[r];
    if (!kInWords<kType>) load_steps<kType>(row.q, a.dim, t.queries + r * p.pitch);
    std::memset(outs + row.place * p.pitch, 0, p.pitch * sizeof(float));
  }
  for (int64_t j = 0; j < t.count; j += kLanes) {
    for (int64_t i = j; i < j + kLanes; i += kFewKeys) {
      for (int64_t r = 0; r < t.rows; ++r) {
        const DecodeRow& row = t.row[r];
        if (!sees(row, i, kFewKeys)) continue;
        multiply_keys<kType>(t.queries + r * p.pitch, row.q, row.keys + i * k_row, k_row,
                             row.seen.hi - 1 - i, a.dim, ahead(row, i),
                             t.products + r * kProducts + (i - j) / kFewKeys * kLanes);
      }
    }
    for (int64_t r = 0; r < t.rows; ++r) {
      if (!sees(t.row[r], j, kLanes)) continue;
      store(t.scores + r * score_pitch + j, join_products(t.products + r * kProducts));
    }
  }
  for (int64_t r = 0; r < t.rows; ++r) {
    const Interval seen = t.row[r].seen;
    float* scores = t.scores + r * score_pitch;
    const F32 lowest = broadcast(-INFINITY), zero = broadcast(0.0f);
    F32 highest = lowest, total = zero;
    const int64_t start = seen.lo / kLanes * kLanes;
    for (int64_t n = start; n < seen.hi; n += kLanes) {
      highest = max(highest, select(lanes_within(n, seen), load(scores + n), lowest));
    }
    const float shift = max_lane(highest) * call.factor;
    for (int64_t n = start; n < seen.hi; n += kLanes) {
      const F32 x = fma(load(scores + n), broadcast(call.factor), broadcast(-shift));
      const F32 weight = select(lanes_within(n, seen), exp2(x), zero);
      total = total + weight;
      store(scores + n, weight);
    }
    partials[t.row[r].place] = seen.empty() ? Partial{-INFINITY, 0.0f} : Partial{shift, sum(total)};
  }
  for (int64_t j = 0; j < t.count; j += p.few) {
    for (int64_t r = 0; r < t.rows; ++r) {
      const DecodeRow& row = t.row[r];
      const Interval part = within(row.seen, j, j + p.few);
      if (part.empty()) continue;
      add_values<kType>(t.scores + r * score_pitch + part.lo, row.values + part.lo * v_row, v_row,
                        part.hi - part.lo, a.dim, ahead(row, t.count + part.lo),
                        outs + row.place * p.pitch);
    }
  }
}

// Row r of one group's, from steps, times `factor`.
void write_merged(const Plan& p, const AttentionTensor& to, int64_t b, int64_t kv_head, int64_t r,
                  float factor, float* merged) {
  const AttentionArgs& a = p.call.a;
  if (a.dtype == DType::kBFloat16) {
    for (int64_t d = 0; d < a.dim; d += kStep) interleave(merged + d);
  }
  const int64_t head = kv_head * p.call.group + r / a.queries;
  write_rows(a.dtype, merged, p.pitch, 1, a.dim, factor, p.call.at(to, b, r % a.queries, head), 0);
}

// The softmax over all pieces of one group's rows; the first piece's memory takes the result.
void merge_decoded(const Plan& p, int64_t b, int64_t kv_head, const Partial* partials,
                   float* outs) {
  const AttentionArgs& a = p.call.a;
  for (int64_t r = 0; r < p.rows; ++r) {
    float highest = -INFINITY, total = 0.0f;
    for (int64_t piece = 0; piece < p.pieces; ++piece) {
      const Partial& x = partials[piece * p.rows + r];
      if (x.sum != 0.0f && !(x.max <= highest)) highest = x.max;
    }
    float* merged = outs + r * p.pitch;
    for (int64_t piece = 0; piece < p.pieces; ++piece) {
      const Partial& x = partials[piece * p.rows + r];
      const F32 share = x.sum != 0.0f ? exp2(broadcast(x.max - highest)) : broadcast(0.0f);
      total += x.sum * first_lane(share);
      const float* part = outs + (piece * p.rows + r) * p.pitch;
      for (int64_t d = 0; d < p.pitch; d += kLanes) {
        const F32 scaled = load(part + d) * share;
        store(merged + d, piece == 0 ? scaled : load(merged + d) + scaled);
      }
    }
    const bool any = total != 0.0f;
    write_merged(p, a.out, b, kv_head, r, any ? 1.0f / total : 0.0f, merged);
    if (!a.lse) continue;
    a.lse[(b * a.kv_heads + kv_head) * p.rows + r] = any ? highest + log2f(total) : -INFINITY;
  }
}

// What one key/value head's rows give to the gradients of one key and its value.
template <DType kType>
PYGPT_INLINE void write_gradients(const Plan& p, const float* queries, const float* douts,
                                  const float* dscores, const float* weights, char* dkey,
                                  char* dvalue) {
  for (int64_t d = 0; d < p.call.a.dim; d += kStep) {
    F32 dk[2] = {broadcast(0.0f), broadcast(0.0f)}, dv[2] = {dk[0], dk[1]};
    for (int64_t r = 0; r < p.rows; ++r) {
      const F32 dscore = broadcast(dscores[r * kLanes]), weight = broadcast(weights[r * kLanes]);
      unroll<2>([&](auto i) PYGPT_LAMBDA {
        const int64_t place = r * p.pitch + d + i * kLanes;
        dk[i] = fma(dscore, load(queries + place), dk[i]);  // forward: score = q k^T
        dv[i] = fma(weight, load(douts + place), dv[i]);    // forward: out += p v
      });
    }
    const int64_t offset = d / kStep * kStepBytes<kType>, left = p.call.a.dim - d;
    store_step<kType>(dkey + offset, left, dk);
    store_step<kType>(dvalue + offset, left, dv);
  }
}

template <DType kType>
void gradient_task(const Plan& p, int64_t index, float* dqueries) {
  const Call& call = p.call;
  const AttentionArgs& a = call.a;
  const int64_t k_row = a.k.row * call.element, v_row = a.v.row * call.element;
  const DecodeTask t = lay_out_task(p, index, kLanes, true);
  for (int64_t r = 0; r < t.rows; ++r) {
    const DecodeRow& row = t.row[r];
    load_steps<kType>(row.q, a.dim, t.queries + r * p.pitch);
    load_steps<kType>(row.dout, a.dim, t.douts + r * p.pitch);
    dot_rows(a.dtype, call.at(a.out, row.b, row.query, row.head), 0, row.dout, 0, 1, a.dim,
             t.deltas + r);
    std::memset(dqueries + row.place * p.pitch, 0, p.pitch * sizeof(float));
  }
  for (int64_t j = 0; j < t.count; j += kLanes) {
    for (int64_t i = j; i < j + kLanes; i += kFewKeys) {
      for (int64_t r = 0; r < t.rows; ++r) {
        const DecodeRow& row = t.row[r];
        if (!sees(row, i, kFewKeys)) continue;
        const int64_t place = r * kProducts + (i - j) / kFewKeys * kLanes;
        const int64_t last = row.seen.hi - 1 - i;
        const bool asks = row.leads && t.first + i + p.ahead < a.keys;
        const auto ahead = [&](const char* rows, int64_t stride) PYGPT_LAMBDA {
          return Ahead{asks ? rows + (i + p.ahead) * stride : nullptr, stride};
        };
        // forward: score = q k^T;  dweight = dout v^T
        multiply_keys<kType>(t.queries + r * p.pitch, row.q, row.keys + i * k_row, k_row, last,
                             a.dim, ahead(row.keys, k_row), t.products + place);
        multiply_keys<kType>(t.douts + r * p.pitch, row.dout, row.values + i * v_row, v_row, last,
                             a.dim, ahead(row.values, v_row), t.value_products + place);
      }
    }
    for (int64_t r = 0; r < t.rows; ++r) {
      const DecodeRow& row = t.row[r];
      float *weights = t.weights + r * kLanes, *dscores = t.scores + r * kLanes;
      F32 weight = broadcast(0.0f), dscore = weight;
      if (sees(row, j, kLanes)) {
        const float lse = a.lse[(row.b * a.heads + row.head) * a.queries + row.query];
        const F32 score = join_products(t.products + r * kProducts);
        const F32 dweight = join_products(t.value_products + r * kProducts);
        const Mask visible = lanes_within(j, row.seen);
        weight = exp2(fma(score, broadcast(call.factor), broadcast(-lse)));
        dscore = weight * (dweight - broadcast(t.deltas[r])) * broadcast(a.scale);
        weight = select(visible, weight, broadcast(0.0f));
        dscore = select(visible, dscore, broadcast(0.0f));
      }
      store(weights, weight);
      store(dscores, dscore);
      const Interval part = within(row.seen, j, j + kLanes);
      if (part.empty()) continue;
      add_values<kType>(dscores + part.lo - j, row.keys + part.lo * k_row, k_row, part.hi - part.lo,
                        a.dim, {}, dqueries + row.place * p.pitch);
    }
    for (int64_t i = 0; i < min(kLanes, t.count - j); ++i) {
      for (int64_t r = 0; r < t.rows; r += p.rows) {
        const int64_t kv_head = t.row[r].head / call.group, key = t.first + j + i;
        write_gradients<kType>(p, t.queries + r * p.pitch, t.douts + r * p.pitch,
                               t.scores + r * kLanes + i, t.weights + r * kLanes + i,
                               call.at(a.dk, t.row[r].b, key, kv_head),
                               call.at(a.dv, t.row[r].b, key, kv_head));
      }
    }
  }
}

// The sum over all pieces of one group's rows; the first piece's memory takes it.
void merge_gradients(const Plan& p, int64_t b, int64_t kv_head, float* dqueries) {
  for (int64_t r = 0; r < p.rows; ++r) {
    float* merged = dqueries + r * p.pitch;
    for (int64_t piece = 1; piece < p.pieces; ++piece) {
      const float* part = merged + piece * p.rows * p.pitch;
      for (int64_t d = 0; d < p.pitch; d += kLanes) {
        store(merged + d, load(merged + d) + load(part + d));
      }
    }
    write_merged(p, p.call.a.dq, b, kv_head, r, 1.0f, merged);
  }
}

}  // namespace

void decode(Call& call) {
  const AttentionArgs& a = call.a;
  const Plan p = plan(call);
  Partial* partials = nullptr;
  float* outs = nullptr;
  const auto lay_out = [&](char* base) {
    Parts parts{base, lay_out_masks(a, base, call)};
    partials = parts.take<Partial>(p.places());
    outs = parts.take<float>(p.places() * p.pitch);
    return parts.used;
  };
  lay_out(call_scratch(lay_out(nullptr)));
  const auto run = a.dtype == DType::kFloat32    ? decode_task<DType::kFloat32>
                   : a.dtype == DType::kBFloat16 ? decode_task<DType::kBFloat16>
                                                 : decode_task<DType::kFloat16>;
  run_tasks(p.tasks(), p.places() * kRowCost + 2 * visible_pairs(call) * a.dim,
            [&](int64_t index, int) { run(p, index, partials, outs); });
  for (int64_t head = 0; head < a.batch * a.kv_heads; ++head) {
    const int64_t place = head * p.pieces * p.rows;
    merge_decoded(p, head / a.kv_heads, head % a.kv_heads, partials + place,
                  outs + place * p.pitch);
  }
}

void decode_backward(Call& call) {
  const AttentionArgs& a = call.a;
  const Plan p = plan(call);
  float* dqueries = nullptr;
  const auto lay_out = [&](char* base) {
    Parts parts{base, lay_out_masks(a, base, call)};
    dqueries = parts.take<float>(p.places() * p.pitch);
    return parts.used;
  };
  lay_out(call_scratch(lay_out(nullptr)));
  const auto run = a.dtype == DType::kFloat32    ? gradient_task<DType::kFloat32>
                   : a.dtype == DType::kBFloat16 ? gradient_task<DType::kBFloat16>
                                                 : gradient_task<DType::kFloat16>;
  run_tasks(p.tasks(), p.places() * kRowCost + 5 * visible_pairs(call) * a.dim,
            [&](int64_t index, int) { run(p, index, dqueries); });
  for (int64_t head = 0; head < a.batch * a.kv_heads; ++head) {
    merge_gradients(p, head / a.kv_heads, head % a.kv_heads,
                    dqueries + head * p.pieces * p.rows * p.pitch);
  }
}

}  // namespace pygpt::PYGPT_ISA_NAMESPACE
