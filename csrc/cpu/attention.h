// What the attention kernels share: masks as intervals, the description of a call, work memory.
//
// Every mask (causal, sliding window, documents, ragged lengths) leaves each query one interval of
// keys, [lo, hi), and both ends only grow from query to query: that is all the kernels know of
// masks. One task owns every element it writes and sums in an order that depends on the shape
// alone, so results do not depend on the number of threads.
//
// Scores are used as exp2(score * scale * log2(e) - ...); log-sum-exps are kept in base 2 likewise.
#pragma once

#include <cmath>

#include "core/parallel.h"
#include "core/scratch.h"
#include "cpu/attention_tiles.h"

namespace pygpt::PYGPT_ISA_NAMESPACE {

constexpr int64_t kPad =
    16;  // floats added to rows of scores, so that they do not share cache sets

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

PYGPT_INLINE Interval within(Interval a, int64_t lo, int64_t hi) {
  return {max(a.lo, lo), min(a.hi, hi)};
}

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

struct Call {  // what all tasks of one call share
  const AttentionArgs& a;
  int64_t element, group;
  int64_t pitch;              // of rows of floats, and of pairs of rows
  int64_t words, word_pitch;  // in a row as score_tile reads it
  // Of words summed in one register: more lose accuracy against torch, which sums few rows over
  // all lanes. One for all scores of a call, lest those of the backward differ.
  int64_t score_step;
  float factor;
  bool pairs;
  const int32_t *lo, *hi;
  int64_t mask_stride;

  Visible visible(int64_t b) const {
    return {lo + b * mask_stride, hi + b * mask_stride, a.queries};
  }
  char* at(const AttentionTensor& t, int64_t b, int64_t row, int64_t head) const {
    return static_cast<char*>(t.data) + (b * t.batch + row * t.row + head * t.head) * element;
  }
};

Call describe(const AttentionArgs& a);
// Fills in the masks of `call`; returns the bytes that they take, and only that for a null base.
size_t lay_out_masks(const AttentionArgs& a, char* base, Call& call);
int64_t visible_pairs(const Call& call);

// Packing and starting a task cost that many multiply_adds / dim.
constexpr int64_t kTaskRows = 250;

PYGPT_INLINE Mask lanes_within(int64_t first, Interval keys) {
  const I32 key = lane_numbers() + broadcast(static_cast<int32_t>(first));
  return (key > broadcast(static_cast<int32_t>(keys.lo - 1))) &
         (key < broadcast(static_cast<int32_t>(keys.hi)));
}

// Copies rows for score_tile, which reads them word by word. Rows are not read where they lie: they
// stand heads * dim apart, which puts them into few of the cache's sets.
template <bool kPairs>
void copy_words(const Call& call, const AttentionTensor& t, int64_t b, int64_t row, int64_t head,
                int64_t rows, float* copy) {
  copy_rows(kPairs ? DType::kFloat32 : call.a.dtype, call.at(t, b, row, head), t.row * call.element,
            rows, call.words, copy, call.word_pitch);
}
// Copies rows to be summed over: as floats, or as pairs of neighbouring rows.
template <bool kPairs>
void copy_sums(const Call& call, const AttentionTensor& t, int64_t b, int64_t row, int64_t head,
               int64_t rows, float* copy) {
  const char* source = call.at(t, b, row, head);
  if constexpr (kPairs) {
    pack_pairs(source, t.row * call.element, rows, call.a.dim, copy, call.pitch);
  } else {
    copy_rows(call.a.dtype, source, t.row * call.element, rows, call.a.dim, copy, call.pitch);
  }
}

// Bit i of `dropped` tells of key first_key + i, a multiple of kLanes: csrc/core/philox.h, a lane
// for every four keys.
void find_dropped(const Call& call, int64_t b, int64_t head, int64_t query, int64_t first_key,
                  int64_t keys, uint64_t* dropped);
PYGPT_INLINE Mask dropped_lanes(const uint64_t* dropped, int64_t j) {
  return mask_of_bits(static_cast<uint32_t>(dropped[j / 64] >> (j % 64)) & ((1u << kLanes) - 1));
}

// Few queries read keys and values as they lie, sooner than tiles of them are packed. Both
// directions do, so that scores are summed in one order.
PYGPT_INLINE bool decodes(const Call& call) {
  const int64_t most = call.pairs && call.a.queries > 1 ? 3 : 8;  // heads of a group count too
  return call.a.queries * call.group <= most && call.a.dropout_p == 0;
}
void decode(Call& call);
void decode_backward(Call& call);

}  // namespace pygpt::PYGPT_ISA_NAMESPACE
