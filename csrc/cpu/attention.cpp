// Causal attention, forward and backward, blocked as in FlashAttention (Dao et al., 2022 and 2023).
//
// Every mask (causal, sliding window, documents, ragged lengths) leaves each query one interval of
// keys, [lo, hi), and both ends only grow from query to query: that is all the kernels know of
// masks. One task owns every element it writes and sums in an order that depends on the shape
// alone, so results do not depend on the number of threads.
//
// Scores are used as exp2(score * scale * log2(e) - ...); log-sum-exps are kept in base 2 likewise.
#include <cmath>

#include "core/parallel.h"
#include "core/philox.h"
#include "cpu/attention_tiles.h"

namespace pygpt::PYGPT_ISA_NAMESPACE {
namespace {

constexpr int64_t kQueryBlock = 48;   // rows of one stripe of scores in the forward
constexpr int64_t kKeyBlock = 512;    // and its columns
constexpr int64_t kSumBlock = 128;    // keys summed in registers, before they are added to memory
constexpr int64_t kGradQueries = 96;  // the block of the backward
constexpr int64_t kGradKeys = 96;
constexpr int64_t kPad =
    16;  // floats added to rows of scores, so that they do not share cache sets
constexpr float kLog2E = 1.44269504088896341f;

static_assert(kQueryBlock % kScoreRows == 0 && kQueryBlock % kSumRows == 0);
static_assert(kKeyBlock % kPanel == 0 && kGradKeys % kPanel == 0 && kGradQueries % 2 == 0);

thread_local Scratch worker_scratch, call_scratch;

PYGPT_INLINE int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }
PYGPT_INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
PYGPT_INLINE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

// Hands out parts of one allocation; from a null base it only measures.
struct Parts {
  char* base;
  size_t used = 0;
  template <class T>
  T* take(int64_t count) {
    T* part = reinterpret_cast<T*>(base + used);
    used += static_cast<size_t>(round_up(count * static_cast<int64_t>(sizeof(T)), 64));
    return part;
  }
};

struct Interval {
  int64_t lo, hi;
  bool empty() const { return hi <= lo; }
};

// The intervals of visible keys, for every query of one sequence.
struct Visible {
  const int32_t *lo, *hi;
  int64_t queries;

  Interval of_rows(int64_t first, int64_t last) const {  // the union over rows [first, last)
    return {lo[first], hi[last - 1]};
  }
  int64_t first_row_after(const int32_t* ends, int64_t key) const {  // with ends[row] > key
    int64_t low = 0, high = queries;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (ends[middle] > key) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    return low;
  }
  Interval rows_of_keys(int64_t first, int64_t last) const {  // rows that see any of [first, last)
    return {first_row_after(hi, first), first_row_after(lo, last - 1)};
  }
};

PYGPT_INLINE Interval within(Interval a, int64_t lo, int64_t hi) {
  return {max(a.lo, lo), min(a.hi, hi)};
}

struct Call {  // what all tasks of one call share
  const AttentionArgs& a;
  int64_t element, group, pitch, words, row_words;
  float factor;
  bool pairs, in_place;
  const int32_t *lo, *hi;
  int64_t mask_stride;

  Visible visible(int64_t b) const {
    return {lo + b * mask_stride, hi + b * mask_stride, a.queries};
  }
  char* at(const AttentionTensor& t, int64_t b, int64_t row, int64_t head) const {
    return static_cast<char*>(t.data) + (b * t.batch + row * t.row + head * t.head) * element;
  }
};

// Fills lo and hi of one sequence. Query i stands at position `length - queries + i` of its keys.
void find_visible(const AttentionArgs& a, int64_t b, int32_t* lo, int32_t* hi) {
  const int64_t length = a.kv_lengths ? min(max(a.kv_lengths[b], 0), a.keys) : a.keys;
  const int32_t* document = a.document_ids ? a.document_ids + b * a.keys : nullptr;
  int64_t start = -1;  // of the document that holds the position
  for (int64_t i = 0; i < a.queries; ++i) {
    const int64_t position = length - a.queries + i;
    hi[i] = static_cast<int32_t>(max(position + 1, 0));
    lo[i] = static_cast<int32_t>(a.window > 0 ? max(position + 1 - a.window, 0) : 0);
    if (!document || position < 0) continue;
    if (start < 0) {
      start = position;
      while (start > 0 && document[start - 1] == document[position]) --start;
    } else if (document[position] != document[position - 1]) {
      start = position;
    }
    lo[i] = static_cast<int32_t>(max(lo[i], start));
  }
}

size_t lay_out_masks(const AttentionArgs& a, char* base, Call& call) {
  Parts parts{base};
  const bool per_sequence = a.kv_lengths || a.document_ids;
  const int64_t rows = (per_sequence ? a.batch : 1) * a.queries;
  int32_t* lo = parts.take<int32_t>(rows);
  int32_t* hi = parts.take<int32_t>(rows);
  call.lo = lo;
  call.hi = hi;
  call.mask_stride = per_sequence ? a.queries : 0;
  if (base) {
    for (int64_t b = 0; b < rows / a.queries; ++b) {
      find_visible(a, b, lo + b * a.queries, hi + b * a.queries);
    }
  }
  return parts.used;
}

bool even_strides(const AttentionTensor& t) {
  return !t.data || ((t.batch | t.row | t.head) & 1) == 0;
}

Call describe(const AttentionArgs& a) {
  const bool pairs = kHasPairs && a.dtype == DType::kBFloat16 && even_strides(a.q) &&
                     even_strides(a.k) && even_strides(a.v) && even_strides(a.dout);
  return Call{.a = a,
              .element = a.dtype == DType::kFloat32 ? 4 : 2,
              .group = a.heads / a.kv_heads,
              .pitch = round_up(a.dim, kLanes),
              .words = pairs ? a.dim / 2 : a.dim,
              .row_words = pairs ? 2 : 1,
              .factor = a.scale * kLog2E,
              .pairs = pairs,
              .in_place = a.dtype == DType::kFloat32 && a.dim % kLanes == 0,
              .lo = nullptr,
              .hi = nullptr,
              .mask_stride = 0};
}

// Runs body(task) for all tasks, on this thread alone where waking others would cost more.
template <class Body>
void run_tasks(int64_t tasks, int64_t multiply_adds, const Body& body) {
  if (multiply_adds < 300'000) {
    for (int64_t task = 0; task < tasks; ++task) body(task);
  } else {
    parallel_tasks(tasks, [&](int64_t task, int) { body(task); });
  }
}

int64_t visible_pairs(const Call& call) {
  const int64_t distinct = call.mask_stride ? call.a.batch : 1;
  int64_t pairs = 0;
  for (int64_t i = 0; i < distinct * call.a.queries; ++i) pairs += max(call.hi[i] - call.lo[i], 0);
  return pairs * call.a.batch / distinct * call.a.heads;
}

PYGPT_INLINE Mask lanes_within(int64_t first, Interval keys) {
  const I32 key = lane_numbers() + broadcast(static_cast<int32_t>(first));
  return (key > broadcast(static_cast<int32_t>(keys.lo - 1))) &
         (key < broadcast(static_cast<int32_t>(keys.hi)));
}

// A block of rows as words for score_tile: in place where it can be read so, else copied as floats.
template <bool kPairs>
Words rows_as_words(const Call& call, const AttentionTensor& t, int64_t b, int64_t row,
                    int64_t head, int64_t rows, float* copy) {
  const char* source = call.at(t, b, row, head);
  if (kPairs || call.a.dtype == DType::kFloat32) {
    return {reinterpret_cast<const float*>(source), t.row / (kPairs ? 2 : 1), 1};
  }
  copy_rows(call.a.dtype, source, t.row * call.element, rows, call.a.dim, copy, call.pitch);
  return {copy, call.pitch, 1};
}

// Rows to be summed over: whole vectors of floats, or of pairs of neighbouring rows.
struct SumRows {
  const float* data;
  int64_t pitch;
};
template <bool kPairs>
SumRows rows_to_sum(const Call& call, const AttentionTensor& t, int64_t b, int64_t row,
                    int64_t head, int64_t rows, float* copy) {
  const char* source = call.at(t, b, row, head);
  if constexpr (kPairs) {
    pack_pairs(source, t.row * call.element, rows, call.a.dim, copy, call.pitch);
  } else {
    if (call.in_place) return {reinterpret_cast<const float*>(source), t.row};
    copy_rows(call.a.dtype, source, t.row * call.element, rows, call.a.dim, copy, call.pitch);
  }
  return {copy, call.pitch};
}

// --- dropout ----------------------------------------------------------------

// Bit i of `dropped` tells of key first_key + i, a multiple of kLanes: csrc/core/philox.h, a lane
// for every four keys.
void find_dropped(const Call& call, int64_t b, int64_t head, int64_t query, int64_t first_key,
                  int64_t keys, uint64_t* dropped) {
  const auto word = [](uint64_t x) { return broadcast(static_cast<int32_t>(x)); };
  const uint32_t threshold = dropout_threshold(call.a.dropout_p);
  const I32 sign = word(0x80000000u), limit = word(threshold ^ 0x80000000u);  // unsigned order
  std::memset(dropped, 0, (keys + 63) / 64 * 8);
  for (int64_t done = 0; done < keys; done += 4 * kLanes) {
    I32 c[4] = {lane_numbers() + word((first_key + done) / 4), word(query), word(head), word(b)};
    uint32_t k0 = static_cast<uint32_t>(call.a.seed), k1 = static_cast<uint32_t>(call.a.seed >> 32);
    for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
      I32 low0, high0, low2, high2;
      multiply_wide(c[0], word(0xD2511F53u), low0, high0);
      multiply_wide(c[2], word(0xCD9E8D57u), low2, high2);
      c[0] = high2 ^ c[1] ^ word(k0);
      c[1] = low2;
      c[2] = high0 ^ c[3] ^ word(k1);
      c[3] = low0;
    }
    uint64_t bit = 0;
    for (int w = 0; w < 4; ++w) {
      const uint32_t below = bits((c[w] ^ sign) < limit);
#if defined(__BMI2__)
      bit |= _pdep_u64(below, 0x1111111111111111u << w);
#else
      for (int i = 0; i < kLanes; ++i) bit |= static_cast<uint64_t>(below >> i & 1) << (4 * i + w);
#endif
    }
    dropped[done / 64] |= bit << (done % 64);
  }
}
PYGPT_INLINE Mask dropped_lanes(const uint64_t* dropped, int64_t j) {
  return mask_of_bits(static_cast<uint32_t>(dropped[j / 64] >> (j % 64)) & ((1u << kLanes) - 1));
}

// --- forward ----------------------------------------------------------------

struct ForwardWork {
  float *keys, *values, *queries, *scores, *out;

  static size_t lay_out(const Call& call, int64_t keys, char* base, ForwardWork& w) {
    Parts parts{base};
    const int64_t rows = round_up(keys + kPanel, kPanel);
    w.keys = parts.take<float>(rows * call.words);
    w.values = parts.take<float>(call.in_place ? 0 : rows / call.row_words * call.pitch);
    w.queries = parts.take<float>(kQueryBlock * call.pitch);
    w.scores = parts.take<float>(kQueryBlock * (kKeyBlock + kPad));
    w.out = parts.take<float>(kQueryBlock * call.pitch);
    return parts.used;
  }
};

// One row of scores -> weights exp2(score * factor - max), in place (as pairs: bf16, two to a
// word), zero for the rest of `tile`, the keys that the rows summed together see. Returns the new
// sum. Dropped weights count in the sum, but become zero.
template <bool kPairs>
float softmax_row(float* scores, Interval keys, Interval tile, float factor, float* max_so_far,
                  float sum_so_far, float* out, int64_t pitch, const uint64_t* dropped) {
  const int64_t full_lo = round_up(keys.lo, kLanes), full_hi = keys.hi / kLanes * kLanes;
  const int64_t start = tile.lo / kLanes * kLanes;
  const F32 lowest = broadcast(-INFINITY);

  const auto each_vector = [&](const auto& whole, const auto& part) PYGPT_LAMBDA {
    int64_t j = start;
    for (; j < tile.hi && (j < full_lo || full_hi < full_lo); j += kLanes) part(j);
    for (; j + kLanes <= full_hi; j += kLanes) whole(j);
    for (; j < tile.hi; j += kLanes) part(j);
  };
  F32 highest = lowest;
  each_vector([&](int64_t j) PYGPT_LAMBDA { highest = max(highest, load(scores + j)); },
              [&](int64_t j) PYGPT_LAMBDA {
                highest = max(highest, select(lanes_within(j, keys), load(scores + j), lowest));
              });
  const float row_max = max_lane(highest) * factor;
  if (row_max > *max_so_far) {
    if (sum_so_far > 0.0f) {
      const float shrink = first_lane(exp2(broadcast(*max_so_far - row_max)));
      sum_so_far *= shrink;
      for (int64_t d = 0; d < pitch; d += kLanes) {
        store(out + d, load(out + d) * broadcast(shrink));
      }
    }
    *max_so_far = row_max;
  }
  const F32 f = broadcast(factor), shift = broadcast(-*max_so_far);
  F32 total = broadcast(0.0f);
  const auto put = [&](int64_t j, F32 p) PYGPT_LAMBDA {
    total = total + p;
    if (dropped) p = select(dropped_lanes(dropped, j), broadcast(0.0f), p);
    if constexpr (kPairs) {
      store_bf16(reinterpret_cast<uint16_t*>(scores) + j, p);
    } else {
      store(scores + j, p);
    }
  };
  const auto weight = [&](int64_t j) PYGPT_LAMBDA {
    const F32 x = fma(load(scores + j), f, shift);
    return kPairs ? exp2_coarse(x) : exp2(x);
  };
  each_vector([&](int64_t j) PYGPT_LAMBDA { put(j, weight(j)); },
              [&](int64_t j) PYGPT_LAMBDA {
                put(j, select(lanes_within(j, keys), weight(j), broadcast(0.0f)));
              });
  return sum_so_far + sum(total);
}

// `packed` is the first key in w.keys and `values`, a multiple of kPanel.
template <bool kPairs>
void forward_block(const Call& call, const ForwardWork& w, SumRows values, int64_t packed,
                   int64_t b, int64_t head, int64_t first, int64_t rows) {
  constexpr int64_t kWord = kPairs ? 2 : 1;
  constexpr int64_t kScorePitch = kKeyBlock + kPad;
  const AttentionArgs& a = call.a;
  const Visible visible = call.visible(b);
  const Words q = rows_as_words<kPairs>(call, a.q, b, first, head, rows, w.queries);
  const bool dropout = a.dropout_p > 0;
  const float keep = static_cast<float>(1.0 - a.dropout_p);
  uint64_t dropped[kKeyBlock / 64];
  float maxima[kQueryBlock], sums[kQueryBlock];
  for (int64_t i = 0; i < rows; ++i) maxima[i] = -INFINITY, sums[i] = 0.0f;
  std::memset(w.out, 0, rows * call.pitch * sizeof(float));

  const Interval all = visible.of_rows(first, first + rows);
  for (int64_t k0 = max(all.lo / kKeyBlock * kKeyBlock, packed); k0 < all.hi; k0 += kKeyBlock) {
    const int64_t k1 = min(k0 + kKeyBlock, all.hi);
    for (int64_t p = k0; p < k1; p += kPanel) {
      const float* panel = w.keys + (p - packed) * call.words;
      for (int64_t r = 0; r < rows; r += kScoreRows) {
        const int64_t n = min(kScoreRows, rows - r);
        if (within(visible.of_rows(first + r, first + r + n), p, p + kPanel).empty()) continue;
        score_tile<kPairs>(static_cast<int>(n), {q.data + r * q.row, q.row, 1}, panel, call.words,
                           w.scores + r * kScorePitch + (p - k0), kScorePitch);
      }
    }
    // Keys as seen from k0 from here on.
    const auto seen_by_tile = [&](int64_t r) {
      const int64_t last = min(r + kSumRows, rows);
      const Interval keys = within(visible.of_rows(first + r, first + last), k0, k1);
      if (keys.empty()) return Interval{0, 0};
      return Interval{(keys.lo - k0) / kWord * kWord, round_up(keys.hi - k0, kWord)};
    };
    for (int64_t i = 0; i < rows; ++i) {
      const Interval keys = within(visible.of_rows(first + i, first + i + 1), k0, k1);
      const Interval tile = seen_by_tile(i / kSumRows * kSumRows);
      if (tile.empty()) continue;
      if (dropout) find_dropped(call, b, head, first + i, k0, tile.hi, dropped);
      sums[i] = softmax_row<kPairs>(w.scores + i * kScorePitch, {keys.lo - k0, keys.hi - k0}, tile,
                                    call.factor, &maxima[i], sums[i], w.out + i * call.pitch,
                                    call.pitch, dropout ? dropped : nullptr);
    }
    // out += weights * values
    for (int64_t s = 0; s < k1 - k0; s += kSumBlock) {
      for (int64_t d = 0; d < call.pitch; d += kSumVecs * kLanes) {
        const int vecs = static_cast<int>(min(kSumVecs, (call.pitch - d) / kLanes));
        for (int64_t r = 0; r < rows; r += kSumRows) {
          const Interval keys = within(seen_by_tile(r), s, s + kSumBlock);
          if (keys.empty()) continue;
          const int n = static_cast<int>(min(kSumRows, rows - r));
          sum_tile<kPairs>(n, vecs, {w.scores + r * kScorePitch + keys.lo / kWord, kScorePitch, 1},
                           values.data + (k0 - packed + keys.lo) / kWord * values.pitch + d,
                           values.pitch, (keys.hi - keys.lo) / kWord, w.out + r * call.pitch + d,
                           call.pitch);
        }
      }
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    const bool any = sums[i] != 0.0f;  // a query without keys gets zeros
    write_rows(a.dtype, w.out + i * call.pitch, call.pitch, 1, a.dim,
               any ? 1.0f / (sums[i] * keep) : 0.0f, call.at(a.out, b, first + i, head), 0);
    a.lse[(b * a.heads + head) * a.queries + first + i] =
        any ? maxima[i] + log2f(sums[i]) : -INFINITY;
  }
}

// All heads of a group over queries [first, last).
template <bool kPairs>
void forward_task(const Call& call, int64_t b, int64_t kv_head, int64_t first, int64_t last) {
  const AttentionArgs& a = call.a;
  const Interval all = call.visible(b).of_rows(first, last);
  const int64_t packed = all.lo / kPanel * kPanel, count = max(all.hi - packed, 0);
  ForwardWork w;
  ForwardWork::lay_out(call, count,
                       worker_scratch.get(ForwardWork::lay_out(call, count, nullptr, w)), w);
  pack_panels<kPairs>(a.dtype, call.at(a.k, b, packed, kv_head), a.k.row * call.element, count,
                      a.dim, w.keys);
  const SumRows values = rows_to_sum<kPairs>(call, a.v, b, packed, kv_head, count, w.values);
  for (int64_t head = kv_head * call.group; head < (kv_head + 1) * call.group; ++head) {
    for (int64_t row = first; row < last; row += kQueryBlock) {
      forward_block<kPairs>(call, w, values, packed, b, head, row, min(kQueryBlock, last - row));
    }
  }
}

// --- decoding: few queries, many keys ---------------------------------------

constexpr int64_t kDecodeRows = 8;    // queries times heads of a group, at most
constexpr int64_t kDecodeKeys = 512;  // of one task; its softmax is merged with the others' after

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
    a.lse[(b * a.heads + head) * a.queries + i] = any ? highest + log2f(total) : -INFINITY;
  }
}

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
  lay_out(call_scratch.get(lay_out(nullptr)));
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

// --- backward ---------------------------------------------------------------

struct GradRows {  // float rows in which dq is added up, of all heads of a group
  float* data;
  int64_t pitch, head;
};

struct BackwardWork {
  float *delta, *queries, *douts, *query_sums, *dout_sums;        // of all rows of a group
  float *key_panels, *value_panels, *key_sums, *dkeys, *dvalues;  // of a block of keys
  float *weights, *dweights, *dscores;                            // of a block of both
  float* dqueries;  // of a group, unless kept elsewhere

  static size_t lay_out(const Call& call, bool own_dq, char* base, BackwardWork& w) {
    Parts parts{base};
    const int64_t rows = round_up(call.a.queries, 2) * call.group;
    const bool copied = !call.pairs && call.a.dtype != DType::kFloat32;
    const int64_t sums = call.in_place || copied ? 0 : rows / call.row_words * call.pitch;
    const int64_t block = kGradQueries * (kGradKeys + kPad);
    w.delta = parts.take<float>(rows);
    w.queries = parts.take<float>(copied ? rows * call.pitch : 0);
    w.douts = parts.take<float>(copied ? rows * call.pitch : 0);
    w.query_sums = parts.take<float>(sums);
    w.dout_sums = parts.take<float>(sums);
    w.key_panels = parts.take<float>(kGradKeys * call.words);
    w.value_panels = parts.take<float>(kGradKeys * call.words);
    w.key_sums = parts.take<float>(call.in_place ? 0 : kGradKeys / call.row_words * call.pitch);
    w.dkeys = parts.take<float>(kGradKeys * call.pitch);
    w.dvalues = parts.take<float>(kGradKeys * call.pitch);
    w.weights = parts.take<float>(block);
    w.dweights = parts.take<float>(block);
    w.dscores = parts.take<float>(call.pairs ? block / 2 : 0);
    w.dqueries = parts.take<float>(own_dq ? call.group * call.a.queries * call.pitch : 0);
    return parts.used;
  }
};

// Scores and gradients of weights -> weights and gradients of scores, both in place. As pairs, two
// rows become one row of words (row i, row i + 1), and dscores gets the gradients as bf16 rows too.
template <bool kPairs>
void grad_rows(float* weights, float* dweights, float* dscores, int64_t keys, int64_t k0,
               const Interval* seen, const float* lse, const float* delta, int rows, float factor,
               const uint64_t (*dropped)[2], float keep) {
  constexpr int64_t kPitch = kGradKeys + kPad;
  const F32 f = broadcast(factor), zero = broadcast(0.0f);
  const auto one = [&](int row, int64_t j, F32& p, F32& dscore) PYGPT_LAMBDA {
    if (row >= rows || seen[row].hi <= k0 + j || seen[row].lo >= k0 + j + kLanes) {
      p = zero;
      dscore = zero;
      return;
    }
    const F32 x = fma(load(weights + row * kPitch + j), f, broadcast(-lse[row]));
    p = kPairs ? exp2_coarse(x) : exp2(x);
    // forward: out = sum (p where kept, over keep) v, p = softmax(score)
    F32 dweight = load(dweights + row * kPitch + j);
    const F32 weight = p;
    if (dropped) {
      const Mask lanes = dropped_lanes(dropped[row], j);
      dweight = select(lanes, zero, dweight * broadcast(1.0f / keep));
      p = select(lanes, zero, p * broadcast(1.0f / keep));
    }
    dscore = weight * (dweight - broadcast(delta[row]));
    if (seen[row].lo > k0 + j || seen[row].hi < k0 + j + kLanes) {
      const Mask visible = lanes_within(k0 + j, seen[row]);
      p = select(visible, p, zero);
      dscore = select(visible, dscore, zero);
    }
  };
  for (int64_t j = 0; j < keys; j += kLanes) {
    F32 p, dscore;
    one(0, j, p, dscore);
    if constexpr (kPairs) {
      F32 p1, dscore1;
      one(1, j, p1, dscore1);
      store(weights + j, pair_bf16(p, p1));
      store(dweights + j, pair_bf16(dscore, dscore1));
      store_bf16(reinterpret_cast<uint16_t*>(dscores) + j, dscore);
      store_bf16(reinterpret_cast<uint16_t*>(dscores + kPitch / 2) + j, dscore1);
    } else {
      store(weights + j, p);
      store(dweights + j, dscore);
    }
  }
}

template <bool kPairs>
struct BackwardRows {  // one head's rows, as the tiles want them
  int64_t b, head;
  Words q, dout;
  SumRows q_sums, dout_sums;
  const float *lse, *delta;
};

// Adds what queries [first, first + rows) give to dkeys, dvalues of keys [k0, k1), and take to dq.
template <bool kPairs>
void backward_block(const Call& call, const BackwardWork& w, const BackwardRows<kPairs>& head,
                    SumRows key_sums, Visible visible, int64_t first, int64_t rows, int64_t k0,
                    int64_t k1, GradRows dq) {
  constexpr int64_t kWord = kPairs ? 2 : 1;
  constexpr int64_t kPitch = kGradKeys + kPad;
  const bool dropout = call.a.dropout_p > 0;
  for (int64_t p = 0; p < k1 - k0; p += kPanel) {
    for (int64_t r = 0; r < rows; r += kScoreRows) {
      const int n = static_cast<int>(min(kScoreRows, rows - r));
      const int64_t row = first + r;
      if (within(visible.of_rows(row, row + n), k0 + p, k0 + p + kPanel).empty()) continue;
      // forward: score = q k^T;  dweight = dout v^T
      score_tile<kPairs>(n, {head.q.data + row * head.q.row, head.q.row, 1},
                         w.key_panels + p * call.words, call.words, w.weights + r * kPitch + p,
                         kPitch);
      score_tile<kPairs>(n, {head.dout.data + row * head.dout.row, head.dout.row, 1},
                         w.value_panels + p * call.words, call.words, w.dweights + r * kPitch + p,
                         kPitch);
    }
  }
  for (int64_t r = 0; r < rows; r += kWord) {
    const int n = static_cast<int>(min(kWord, rows - r));
    Interval seen[2];
    uint64_t dropped[2][2];
    static_assert(kGradKeys <= 128);
    for (int i = 0; i < n; ++i) {
      seen[i] = visible.of_rows(first + r + i, first + r + i + 1);
      if (dropout) find_dropped(call, head.b, head.head, first + r + i, k0, k1 - k0, dropped[i]);
    }
    grad_rows<kPairs>(w.weights + r * kPitch, w.dweights + r * kPitch, w.dscores + r * kPitch / 2,
                      k1 - k0, k0, seen, head.lse + first + r, head.delta + first + r, n,
                      call.factor, dropout ? dropped : nullptr,
                      static_cast<float>(1.0 - call.a.dropout_p));
  }
  // As pairs, row r of words holds rows 2r and 2r + 1 and stands where row 2r was.
  for (int64_t d = 0; d < call.pitch; d += kSumVecs * kLanes) {
    const int vecs = static_cast<int>(min(kSumVecs, (call.pitch - d) / kLanes));
    for (int64_t j = 0; j < k1 - k0; j += kSumRows) {
      const int n = static_cast<int>(min(kSumRows, k1 - k0 - j));
      Interval seen = within(visible.rows_of_keys(k0 + j, k0 + j + n), first, first + rows);
      if (seen.empty()) continue;
      seen.lo = first + (seen.lo - first) / kWord * kWord;
      const int64_t steps = (round_up(seen.hi - seen.lo, kWord)) / kWord;
      const int64_t offset = (seen.lo - first) * kPitch + j;
      // forward: out += p v
      sum_tile<kPairs>(n, vecs, {w.weights + offset, 1, kPitch * kWord},
                       head.dout_sums.data + seen.lo / kWord * head.dout_sums.pitch + d,
                       head.dout_sums.pitch, steps, w.dvalues + j * call.pitch + d, call.pitch);
      // forward: score = q k^T
      sum_tile<kPairs>(n, vecs, {w.dweights + offset, 1, kPitch * kWord},
                       head.q_sums.data + seen.lo / kWord * head.q_sums.pitch + d,
                       head.q_sums.pitch, steps, w.dkeys + j * call.pitch + d, call.pitch);
    }
    for (int64_t r = 0; r < rows; r += kSumRows) {
      const int n = static_cast<int>(min(kSumRows, rows - r));
      Interval seen = within(visible.of_rows(first + r, first + r + n), k0, k1);
      if (seen.empty()) continue;
      const int64_t lo = (seen.lo - k0) / kWord * kWord;
      const int64_t steps = round_up(seen.hi - k0 - lo, kWord) / kWord;
      const Words dscores = kPairs ? Words{w.dscores + r * kPitch / 2 + lo / 2, kPitch / 2, 1}
                                   : Words{w.dweights + r * kPitch + lo, kPitch, 1};
      sum_tile<kPairs>(n, vecs, dscores, key_sums.data + lo / kWord * key_sums.pitch + d,
                       key_sums.pitch, steps, dq.data + (first + r) * dq.pitch + d, dq.pitch);
    }
  }
}

void write_dq(const Call& call, int64_t b, int64_t head, const float* rows, int64_t pitch) {
  const AttentionArgs& a = call.a;
  write_rows(a.dtype, rows, pitch, a.queries, a.dim, a.scale, call.at(a.dq, b, 0, head),
             a.dq.row * call.element);
}

// One key/value head, keys [k_first, k_last): its dk and dv, and its part of the group's dq, which
// goes to `partial_dq`, or, where that is null, is all of it and is written.
template <bool kPairs>
void backward_task(const Call& call, int64_t b, int64_t kv_head, int64_t k_first, int64_t k_last,
                   float* partial_dq) {
  constexpr int64_t kWord = kPairs ? 2 : 1;
  const AttentionArgs& a = call.a;
  const Visible visible = call.visible(b);
  const int64_t rows = round_up(a.queries, 2);
  const bool own_dq = !partial_dq && !call.in_place;
  BackwardWork w;
  BackwardWork::lay_out(call, own_dq,
                        worker_scratch.get(BackwardWork::lay_out(call, own_dq, nullptr, w)), w);
  GradRows dq = {partial_dq ? partial_dq : w.dqueries, call.pitch, a.queries * call.pitch};
  if (!partial_dq && call.in_place) {
    dq = {reinterpret_cast<float*>(call.at(a.dq, b, 0, kv_head * call.group)), a.dq.row, a.dq.head};
  }

  const auto of_head = [&](int64_t g) {
    const int64_t head = kv_head * call.group + g, copy = g * rows * call.pitch;
    BackwardRows<kPairs> r;
    r.b = b;
    r.head = head;
    r.lse = a.lse + (b * a.heads + head) * a.queries;
    r.delta = w.delta + g * rows;
    const bool copied = !kPairs && a.dtype != DType::kFloat32;
    const auto words = [&](const AttentionTensor& t, float* copies) {
      if (copied) return Words{copies + copy, call.pitch, 1};
      return Words{reinterpret_cast<const float*>(call.at(t, b, 0, head)), t.row / kWord, 1};
    };
    r.q = words(a.q, w.queries);
    r.dout = words(a.dout, w.douts);
    if (copied || call.in_place) {
      r.q_sums = {r.q.data, r.q.row};
      r.dout_sums = {r.dout.data, r.dout.row};
    } else {
      r.q_sums = {w.query_sums + copy / kWord, call.pitch};
      r.dout_sums = {w.dout_sums + copy / kWord, call.pitch};
    }
    return r;
  };
  for (int64_t g = 0; g < call.group; ++g) {
    const int64_t head = kv_head * call.group + g, copy = g * rows * call.pitch;
    for (int64_t i = 0; i < a.queries; ++i) {
      w.delta[g * rows + i] =
          dot_rows(a.dtype, call.at(a.out, b, i, head), call.at(a.dout, b, i, head), a.dim);
      std::memset(dq.data + g * dq.head + i * dq.pitch, 0, call.pitch * sizeof(float));
    }
    if (!kPairs && a.dtype != DType::kFloat32) {
      rows_as_words<kPairs>(call, a.q, b, 0, head, a.queries, w.queries + copy);
      rows_as_words<kPairs>(call, a.dout, b, 0, head, a.queries, w.douts + copy);
    } else if (!call.in_place) {
      rows_to_sum<kPairs>(call, a.q, b, 0, head, a.queries, w.query_sums + copy / kWord);
      rows_to_sum<kPairs>(call, a.dout, b, 0, head, a.queries, w.dout_sums + copy / kWord);
    }
  }

  for (int64_t k0 = k_first; k0 < k_last; k0 += kGradKeys) {
    const int64_t k1 = min(k0 + kGradKeys, k_last);
    const int64_t k_stride = a.k.row * call.element, v_stride = a.v.row * call.element;
    pack_panels<kPairs>(a.dtype, call.at(a.k, b, k0, kv_head), k_stride, k1 - k0, a.dim,
                        w.key_panels);
    pack_panels<kPairs>(a.dtype, call.at(a.v, b, k0, kv_head), v_stride, k1 - k0, a.dim,
                        w.value_panels);
    const SumRows key_sums = rows_to_sum<kPairs>(call, a.k, b, k0, kv_head, k1 - k0, w.key_sums);
    std::memset(w.dkeys, 0, kGradKeys * call.pitch * sizeof(float));
    std::memset(w.dvalues, 0, kGradKeys * call.pitch * sizeof(float));
    const Interval seen = visible.rows_of_keys(k0, k1);
    for (int64_t g = 0; g < call.group; ++g) {
      const BackwardRows<kPairs> head = of_head(g);
      const GradRows head_dq = {dq.data + g * dq.head, dq.pitch, dq.head};
      for (int64_t row = seen.lo / 2 * 2; row < seen.hi; row += kGradQueries) {
        backward_block<kPairs>(call, w, head, key_sums, visible, row,
                               min(kGradQueries, seen.hi - row), k0, k1, head_dq);
      }
    }
    write_rows(a.dtype, w.dkeys, call.pitch, k1 - k0, a.dim, a.scale, call.at(a.dk, b, k0, kv_head),
               a.dk.row * call.element);
    write_rows(a.dtype, w.dvalues, call.pitch, k1 - k0, a.dim, 1.0f, call.at(a.dv, b, k0, kv_head),
               a.dv.row * call.element);
  }
  for (int64_t g = 0; g < call.group && !partial_dq; ++g) {
    write_dq(call, b, kv_head * call.group + g, dq.data + g * dq.head, dq.pitch);
  }
}

}  // namespace

void attention_forward(const AttentionArgs& a) {
  Call call = describe(a);
  // Without a cache this may be training, whose backward wants scores that were summed in its
  // order.
  if (a.keys > a.queries && a.queries * call.group <= kDecodeRows && a.dropout_p == 0) {
    return decode(call);
  }
  lay_out_masks(a, call_scratch.get(lay_out_masks(a, nullptr, call)), call);
  const int64_t work = visible_pairs(call) * a.dim;
  // A task packs the keys it needs, so heads are cut into pieces only where there are few of them.
  const int64_t blocks = (a.queries + kQueryBlock - 1) / kQueryBlock, heads = a.batch * a.kv_heads;
  const int64_t pieces = max(1, min(blocks / 2, (3 * num_threads() + heads - 1) / heads));
  run_tasks(heads * pieces, work, [&](int64_t task) {
    // Later pieces see more keys: they are shorter, and go first. Equal areas under the diagonal.
    const int64_t piece = pieces - 1 - task / heads, b = task % heads / a.kv_heads;
    const auto cut = [&](int64_t i) {
      const double share = std::sqrt(static_cast<double>(i) / static_cast<double>(pieces));
      return i == pieces ? a.queries
                         : static_cast<int64_t>(share * static_cast<double>(blocks)) * kQueryBlock;
    };
    const int64_t first = cut(piece), last = cut(piece + 1);
    if (first >= last) return;
    if (kHasPairs && call.pairs) {
      forward_task<kHasPairs>(call, b, task % a.kv_heads, first, last);
    } else {
      forward_task<false>(call, b, task % a.kv_heads, first, last);
    }
  });
}

void attention_backward(const AttentionArgs& a) {
  Call call = describe(a);
  const int64_t heads = a.batch * a.kv_heads;
  // Few heads: keys are cut too, each piece with a dq of its own, added up in order afterwards.
  const int64_t pieces = max(1, min(a.keys / 512, (12 + heads - 1) / heads));
  const int64_t piece_keys = round_up((a.keys + pieces - 1) / pieces, kGradKeys);
  const int64_t head_dq = a.queries * call.pitch, group_dq = call.group * head_dq;
  float* dq = nullptr;
  const auto lay_out = [&](char* base) {
    Parts parts{base, lay_out_masks(a, base, call)};
    dq = parts.take<float>(pieces > 1 ? heads * pieces * group_dq : 0);
    return parts.used;
  };
  lay_out(call_scratch.get(lay_out(nullptr)));
  run_tasks(heads * pieces, 2 * visible_pairs(call) * a.dim, [&](int64_t task) {
    const int64_t piece = task / heads, head = task % heads;  // early keys are seen most: first
    const int64_t b = head / a.kv_heads, kv_head = head % a.kv_heads;
    const int64_t first = min(a.keys, piece * piece_keys), last = min(a.keys, first + piece_keys);
    float* partial_dq = pieces > 1 ? dq + (head * pieces + piece) * group_dq : nullptr;
    if (kHasPairs && call.pairs) {
      backward_task<kHasPairs>(call, b, kv_head, first, last, partial_dq);
    } else {
      backward_task<false>(call, b, kv_head, first, last, partial_dq);
    }
  });
  if (pieces == 1) return;
  run_tasks(a.batch * a.heads, heads * pieces * group_dq, [&](int64_t task) {
    const int64_t head = task / call.group, g = task % call.group;
    float* total = dq + head * pieces * group_dq + g * head_dq;
    for (int64_t piece = 1; piece < pieces; ++piece) {
      const float* part = total + piece * group_dq;
      for (int64_t i = 0; i < head_dq; i += kLanes) {
        store(total + i, load(total + i) + load(part + i));
      }
    }
    write_dq(call, task / a.heads, task % a.heads, total, call.pitch);
  });
}

}  // namespace pygpt::PYGPT_ISA_NAMESPACE
