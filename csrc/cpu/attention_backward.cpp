// The backward of causal attention.
#include "cpu/attention.h"

namespace pygpt::PYGPT_ISA_NAMESPACE {
namespace {

constexpr int64_t kGradQueries = 192;  // at most, in a block of scores
constexpr int64_t kGradKeys = 128;
constexpr int64_t kFloatSteps = 48;  // summed in registers; more would lose to torch's accuracy

constexpr int64_t kScorePitch = kGradKeys + kPad;
constexpr int64_t kDroppedWords = (kGradKeys + 63) / 64;

static_assert(kGradKeys % kPanel == 0 && kGradQueries % kScoreRows == 0 &&
              kScoreRows % kSoftmaxRows == 0);

// The size of blocks that cut `length` into nearly equal ones of at most `most`.
int64_t even_step(int64_t length, int64_t most, int64_t multiple) {
  const int64_t blocks = max(1, (length + most - 1) / most);
  return max(multiple, round_up((length + blocks - 1) / blocks, multiple));
}

struct BackwardWork {
  float *delta, *queries, *douts, *query_sums, *dout_sums;        // of all rows of a group
  float *key_panels, *value_panels, *key_sums, *dkeys, *dvalues;  // of a block of keys
  float *weights, *dweights, *dscores;                            // of a block of both
  float* dqueries;  // of a group, unless kept elsewhere

  static size_t lay_out(const Call& call, bool own_dq, char* base, BackwardWork& w) {
    Parts parts{base};
    const int64_t rows = round_up(call.a.queries, 2) * call.group;
    const int64_t block = kGradQueries * kScorePitch;
    w.delta = parts.take<float>(rows);
    w.queries = parts.take<float>(rows * call.word_pitch);
    w.douts = parts.take<float>(rows * call.word_pitch);
    w.query_sums = call.pairs ? parts.take<float>(rows / 2 * call.pitch) : w.queries;
    w.dout_sums = call.pairs ? parts.take<float>(rows / 2 * call.pitch) : w.douts;
    w.key_panels = parts.take<float>(kGradKeys * call.words);
    w.value_panels = parts.take<float>(kGradKeys * call.words);
    w.key_sums = parts.take<float>(kGradKeys / (call.pairs ? 2 : 1) * call.pitch);
    w.dkeys = parts.take<float>(kGradKeys * call.pitch);
    w.dvalues = parts.take<float>(kGradKeys * call.pitch);
    w.weights = parts.take<float>(block);
    w.dweights = parts.take<float>(block);
    w.dscores = parts.take<float>(call.pairs ? block / 2 : 0);
    w.dqueries = parts.take<float>(own_dq ? call.group * call.a.queries * call.pitch : 0);
    return parts.used;
  }
};

// kRows rows of scores and of gradients of weights -> weights and gradients of scores, in place,
// and zeros where a key is not seen. As pairs, two rows become one row of words (row i, row i + 1),
// and dscores gets the gradients as bf16 rows too. keys counts from the block's first.
template <bool kPairs, int kRows>
void grad_rows(float* weights, float* dweights, float* dscores, int64_t width, const Interval* keys,
               const float* lse, const float* delta, float factor,
               const uint64_t (*dropped)[kDroppedWords], float keep) {
  constexpr int kWord = kPairs ? 2 : 1;
  const F32 f = broadcast(factor), zero = broadcast(0.0f), upscale = broadcast(1.0f / keep);
  const auto put = [&](auto n, int64_t j, const F32* p, const F32* dscore) PYGPT_LAMBDA {
    float *weight_row = weights + n * kWord * kScorePitch + j,
          *dscore_row = dweights + n * kWord * kScorePitch + j;
    if constexpr (kPairs) {
      store(weight_row, pair_bf16(p[0], p[1]));
      store(dscore_row, pair_bf16(dscore[0], dscore[1]));
      uint16_t* rows = reinterpret_cast<uint16_t*>(dscores + n * kScorePitch) + j;
      store_bf16(rows, dscore[0]);
      store_bf16(rows + kScorePitch, dscore[1]);
    } else {
      store(weight_row, p[0]);
      store(dscore_row, dscore[0]);
    }
  };
  const auto vectors = [&](int64_t from, int64_t to, auto masked) PYGPT_LAMBDA {
    for (int64_t j = from; j < to; j += kLanes) {
      unroll<kRows / kWord>([&](auto n) PYGPT_LAMBDA {
        F32 p[kWord], dscore[kWord];
        unroll<kWord>([&](auto w) PYGPT_LAMBDA {
          const int row = n * kWord + w;
          const F32 x = fma(load(weights + row * kScorePitch + j), f, broadcast(-lse[row]));
          const F32 weight = kPairs ? exp2_coarse(x) : exp2(x);
          // forward: out = sum (p where kept, over keep) v, p = softmax(score)
          F32 dweight = load(dweights + row * kScorePitch + j);
          p[w] = weight;
          if (dropped) {
            const Mask lanes = dropped_lanes(dropped[row], j);
            dweight = select(lanes, zero, dweight * upscale);
            p[w] = select(lanes, zero, weight * upscale);
          }
          dscore[w] = weight * (dweight - broadcast(delta[row]));
          if constexpr (masked) {
            const Mask visible = lanes_within(j, keys[row]);
            p[w] = select(visible, p[w], zero);
            dscore[w] = select(visible, dscore[w], zero);
          }
        });
        put(n, j, p, dscore);
      });
    }
  };
  const auto zeros = [&](int64_t from, int64_t to) PYGPT_LAMBDA {
    const F32 none[2] = {zero, zero};
    for (int64_t j = from; j < to; j += kLanes) {
      unroll<kRows / kWord>([&](auto n) PYGPT_LAMBDA { put(n, j, none, none); });
    }
  };
  Interval any = keys[0], full = keys[0];
  for (int r = 1; r < kRows; ++r) {
    if (keys[r].empty()) {
      full = {0, 0};
      continue;
    }
    any = any.empty() ? keys[r] : Interval{min(any.lo, keys[r].lo), max(any.hi, keys[r].hi)};
    full = within(full, keys[r].lo, keys[r].hi);
  }
  any = {any.lo / kLanes * kLanes, min(round_up(any.hi, kLanes), width)};
  full = {round_up(full.lo, kLanes), full.hi / kLanes * kLanes};
  if (full.empty()) full = {any.lo, any.lo};
  zeros(0, any.lo);
  vectors(any.lo, full.lo, std::true_type());
  vectors(full.lo, full.hi, std::false_type());
  vectors(full.hi, any.hi, std::true_type());
  zeros(any.hi, width);
}

struct BackwardRows {  // one head's rows, as the tiles want them
  int64_t b, head;
  const float *q, *dout, *q_sums, *dout_sums, *lse, *delta;
  float* dq;
};

// Adds what queries [first, first + rows) give to dkeys, dvalues of keys [k0, k1), and take to dq.
template <bool kPairs>
void backward_block(const Call& call, const BackwardWork& w, const BackwardRows& head,
                    Visible visible, int64_t first, int64_t rows, int64_t k0, int64_t k1) {
  constexpr int64_t kWord = kPairs ? 2 : 1;
  const bool dropout = call.a.dropout_p > 0;
  const float keep = static_cast<float>(1.0 - call.a.dropout_p);
  // Keys of rows [r, r + n), counted from k0.
  const auto seen = [&](int64_t r, int64_t n) PYGPT_LAMBDA {
    const Interval keys = within(visible.of_rows(first + r, first + r + n), k0, k1);
    return keys.empty() ? Interval{0, 0} : Interval{keys.lo - k0, keys.hi - k0};
  };
  for (int64_t r = 0; r < rows; r += kScoreRows) {
    const int64_t n = min(kScoreRows, rows - r);
    const Interval keys = seen(r, n);
    const int64_t p = keys.lo / kPanel * kPanel;
    const auto scores = [&](const float* words, const float* panels, float* out) PYGPT_LAMBDA {
      score_tiles<kPairs>(static_cast<int>(n), keys.hi - p,
                          {words + (first + r) * call.word_pitch, call.word_pitch, 1},
                          panels + p * call.words, call.words, call.score_step,
                          out + r * kScorePitch + p, kScorePitch);
    };
    // forward: score = q k^T;  dweight = dout v^T
    scores(head.q, w.key_panels, w.weights);
    scores(head.dout, w.value_panels, w.dweights);
    const auto softmax = [&]<int kRows>(std::integral_constant<int, kRows>,
                                        int64_t i) PYGPT_LAMBDA {
      Interval row_keys[kRows];
      float lse[kRows], delta[kRows];
      uint64_t dropped[kRows][kDroppedWords];
      for (int64_t j = 0; j < kRows; ++j) {
        const int64_t row = first + i + j;
        const bool exists = i + j < rows;  // or it is the other half of the last pair
        row_keys[j] = exists ? seen(i + j, 1) : Interval{0, 0};
        lse[j] = exists ? head.lse[row] : 0.0f;
        delta[j] = exists ? head.delta[row] : 0.0f;
        if (dropout) find_dropped(call, head.b, head.head, row, k0, k1 - k0, dropped[j]);
      }
      grad_rows<kPairs, kRows>(w.weights + i * kScorePitch, w.dweights + i * kScorePitch,
                               w.dscores + i * kScorePitch / 2, round_up(k1 - k0, kLanes), row_keys,
                               lse, delta, call.factor, dropout ? dropped : nullptr, keep);
    };
    int64_t i = r;
    for (; i + kSoftmaxRows <= r + n; i += kSoftmaxRows) {
      softmax(std::integral_constant<int, kSoftmaxRows>(), i);
    }
    for (; i < r + n; i += kWord) softmax(std::integral_constant<int, kWord>(), i);
    for (int64_t t = r; t < r + n; t += kSumRows) {
      const int64_t tile_rows = min(kSumRows, r + n - t);
      const Interval tile = seen(t, tile_rows);
      if (tile.empty()) continue;
      const int64_t lo = tile.lo / kWord, steps = round_up(tile.hi, kWord) / kWord - lo;
      const Words dscores = kPairs ? Words{w.dscores + t * kScorePitch / 2 + lo, kScorePitch / 2, 1}
                                   : Words{w.dweights + t * kScorePitch + lo, kScorePitch, 1};
      for (int64_t d = 0; d < call.pitch; d += kSumVecs * kLanes) {
        const int vecs = static_cast<int>(min(kSumVecs, (call.pitch - d) / kLanes));
        // forward: score = q k^T
        sum_tile<kPairs>(static_cast<int>(tile_rows), vecs, dscores,
                         w.key_sums + lo * call.pitch + d, call.pitch, steps,
                         head.dq + (first + t) * call.pitch + d, call.pitch);
      }
    }
  }
  // As pairs, row r of words holds rows 2r and 2r + 1 and stands where row 2r was.
  for (int64_t d = 0; d < call.pitch; d += kSumVecs * kLanes) {
    const int vecs = static_cast<int>(min(kSumVecs, (call.pitch - d) / kLanes));
    for (int64_t j = 0; j < k1 - k0; j += kSumRows) {
      const int n = static_cast<int>(min(kSumRows, k1 - k0 - j));
      Interval tile = within(visible.rows_of_keys(k0 + j, k0 + j + n), first, first + rows);
      if (tile.empty()) continue;
      tile.lo = first + (tile.lo - first) / kWord * kWord;
      const int64_t steps = round_up(tile.hi - tile.lo, kWord) / kWord;
      const int64_t offset = (tile.lo - first) * kScorePitch + j;
      const auto sums = [&](const float* words, const float* rows_summed, float* out) PYGPT_LAMBDA {
        constexpr int64_t kMost = kPairs ? kGradQueries / 2 : kFloatSteps;
        for (int64_t step = 0; step < steps; step += kMost) {
          sum_tile<kPairs>(n, vecs,
                           {words + offset + step * kScorePitch * kWord, 1, kScorePitch * kWord},
                           rows_summed + (tile.lo / kWord + step) * call.pitch + d, call.pitch,
                           min(kMost, steps - step), out + j * call.pitch + d, call.pitch);
        }
      };
      sums(w.weights, head.dout_sums, w.dvalues);  // forward: out += p v
      sums(w.dweights, head.q_sums, w.dkeys);      // forward: score = q k^T
    }
  }
}

void write_dq(const Call& call, int64_t b, int64_t head, const float* rows) {
  const AttentionArgs& a = call.a;
  write_rows(a.dtype, rows, call.pitch, a.queries, a.dim, a.scale, call.at(a.dq, b, 0, head),
             a.dq.row * call.element);
}

// One key/value head, keys [k_first, k_last): its dk and dv, and its part of the group's dq, which
// goes to `partial_dq`, or, where that is null, is all of it and is written.
template <bool kPairs>
void backward_task(const Call& call, int64_t b, int64_t kv_head, int64_t k_first, int64_t k_last,
                   float* partial_dq) {
  const AttentionArgs& a = call.a;
  const Visible visible = call.visible(b);
  const int64_t rows = round_up(a.queries, 2);
  BackwardWork w;
  BackwardWork::lay_out(call, !partial_dq,
                        task_scratch(BackwardWork::lay_out(call, !partial_dq, nullptr, w)), w);
  float* dq = partial_dq ? partial_dq : w.dqueries;
  std::memset(dq, 0, call.group * a.queries * call.pitch * sizeof(float));
  for (int64_t g = 0; g < call.group; ++g) {
    const int64_t head = kv_head * call.group + g;
    dot_rows(a.dtype, call.at(a.out, b, 0, head), a.out.row * call.element,
             call.at(a.dout, b, 0, head), a.dout.row * call.element, a.queries, a.dim,
             w.delta + g * rows);
    copy_words<kPairs>(call, a.q, b, 0, head, a.queries, w.queries + g * rows * call.word_pitch);
    copy_words<kPairs>(call, a.dout, b, 0, head, a.queries, w.douts + g * rows * call.word_pitch);
    if constexpr (kPairs) {
      const int64_t sums = g * rows / 2 * call.pitch;
      copy_sums<kPairs>(call, a.q, b, 0, head, a.queries, w.query_sums + sums);
      copy_sums<kPairs>(call, a.dout, b, 0, head, a.queries, w.dout_sums + sums);
    }
  }
  const auto of_head = [&](int64_t g) {
    const int64_t head = kv_head * call.group + g;
    const int64_t words = g * rows * call.word_pitch,
                  sums = g * rows / (kPairs ? 2 : 1) * call.pitch;
    return BackwardRows{.b = b,
                        .head = head,
                        .q = w.queries + words,
                        .dout = w.douts + words,
                        .q_sums = w.query_sums + sums,
                        .dout_sums = w.dout_sums + sums,
                        .lse = a.lse + (b * a.heads + head) * a.queries,
                        .delta = w.delta + g * rows,
                        .dq = dq + g * a.queries * call.pitch};
  };

  const int64_t key_step = even_step(k_last - k_first, kGradKeys, kPanel);
  for (int64_t k0 = k_first; k0 < k_last; k0 += key_step) {
    const int64_t k1 = min(k0 + key_step, k_last);
    const int64_t k_stride = a.k.row * call.element, v_stride = a.v.row * call.element;
    pack_panels<kPairs>(a.dtype, call.at(a.k, b, k0, kv_head), k_stride, k1 - k0, a.dim,
                        w.key_panels);
    pack_panels<kPairs>(a.dtype, call.at(a.v, b, k0, kv_head), v_stride, k1 - k0, a.dim,
                        w.value_panels);
    copy_sums<kPairs>(call, a.k, b, k0, kv_head, k1 - k0, w.key_sums);
    std::memset(w.dkeys, 0, (k1 - k0) * call.pitch * sizeof(float));
    std::memset(w.dvalues, 0, (k1 - k0) * call.pitch * sizeof(float));
    const Interval seen = visible.rows_of_keys(k0, k1);
    for (int64_t g = 0; g < call.group; ++g) {
      const BackwardRows head = of_head(g);
      const int64_t lo = seen.lo / 2 * 2, step = even_step(seen.hi - lo, kGradQueries, kScoreRows);
      for (int64_t row = lo; row < seen.hi; row += step) {
        backward_block<kPairs>(call, w, head, visible, row, min(step, seen.hi - row), k0, k1);
      }
    }
    write_rows(a.dtype, w.dkeys, call.pitch, k1 - k0, a.dim, a.scale, call.at(a.dk, b, k0, kv_head),
               a.dk.row * call.element);
    write_rows(a.dtype, w.dvalues, call.pitch, k1 - k0, a.dim, 1.0f, call.at(a.dv, b, k0, kv_head),
               a.dv.row * call.element);
  }
  for (int64_t g = 0; g < call.group && !partial_dq; ++g) {
    write_dq(call, b, kv_head * call.group + g, dq + g * a.queries * call.pitch);
  }
}

}  // namespace

void attention_backward(const AttentionArgs& a) {
  Call call = describe(a);
  if (decodes(call)) return decode_backward(call);
  const int64_t heads = a.batch * a.kv_heads;
  // Few heads: keys are cut too, each piece with a dq of its own, added up in order afterwards.
  const int64_t pieces = max(1, min(a.keys / 512, (12 + heads - 1) / heads));
  const int64_t piece_keys = round_up((a.keys + pieces - 1) / pieces, kPanel);
  const int64_t head_dq = a.queries * call.pitch, group_dq = call.group * head_dq;
  float* dq = nullptr;
  const auto lay_out = [&](char* base) {
    Parts parts{base, lay_out_masks(a, base, call)};
    dq = parts.take<float>(pieces > 1 ? heads * pieces * group_dq : 0);
    return parts.used;
  };
  lay_out(call_scratch(lay_out(nullptr)));
  run_tasks(heads * pieces, (2 * visible_pairs(call) + heads * pieces * kTaskRows) * a.dim,
            [&](int64_t task, int) {
              const int64_t head = task / pieces;
              const int64_t piece = task % pieces;  // early keys are seen most: first
              const int64_t b = head / a.kv_heads, kv_head = head % a.kv_heads;
              const int64_t first = min(a.keys, piece * piece_keys),
                            last = min(a.keys, first + piece_keys);
              float* partial_dq = pieces > 1 ? dq + (head * pieces + piece) * group_dq : nullptr;
              if (kHasPairs && call.pairs) {
                backward_task<kHasPairs>(call, b, kv_head, first, last, partial_dq);
              } else {
                backward_task<false>(call, b, kv_head, first, last, partial_dq);
              }
            });
  if (pieces == 1) return;
  run_tasks(a.batch * a.heads, heads * pieces * group_dq, [&](int64_t task, int) {
    const int64_t head = task / call.group, g = task % call.group;
    float* total = dq + head * pieces * group_dq + g * head_dq;
    for (int64_t piece = 1; piece < pieces; ++piece) {
      const float* part = total + piece * group_dq;
      for (int64_t i = 0; i < head_dq; i += kLanes) {
        store(total + i, load(total + i) + load(part + i));
      }
    }
    write_dq(call, task / a.heads, task % a.heads, total);
  });
}

}  // namespace pygpt::PYGPT_ISA_NAMESPACE
