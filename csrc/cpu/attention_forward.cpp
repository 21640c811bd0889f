// The forward of causal attention, blocked as in FlashAttention (Dao et al., 2022 and 2023).
//
// A block of queries meets a block of keys in tiles of kScoreRows queries, so that the scores of a
// tile stay in the L1 cache from the product with the keys through softmax to the product with the
// values, while keys and values stay in L2.
#include "cpu/attention.h"

namespace pygpt::PYGPT_ISA_NAMESPACE {
namespace {

constexpr int64_t kQueryBlock = 96;
constexpr int64_t kKeyBlock = 512;
constexpr int64_t kSumBlock = 128;  // words summed in registers, before they are added to memory
constexpr int64_t kInPlace = 512;  // values; of more a copy pays, since their rows share cache sets
constexpr int64_t kScorePitch = kKeyBlock + kPad;

static_assert(kQueryBlock % kScoreRows == 0 && kScoreRows % kSumRows == 0 &&
              kKeyBlock % kPanel == 0);
static_assert(kSumRows % kSoftmaxRows == 0 && kQueryBlock % kLanes == 0);

struct ForwardWork {
  float *keys, *values, *queries, *scores, *out;
  int64_t value_pitch;

  static size_t lay_out(const Call& call, int64_t keys, char* base, ForwardWork& w) {
    Parts parts{base};
    const int64_t rows = round_up(keys + kPanel, kPanel);
    w.keys = parts.take<float>(rows * call.words);
    w.values = parts.take<float>(rows / (call.pairs ? 2 : 1) * call.pitch);
    w.queries = parts.take<float>(kQueryBlock * call.word_pitch);
    w.scores = parts.take<float>(kScoreRows * kScorePitch);
    w.out = parts.take<float>(kQueryBlock * call.pitch);
    return parts.used;
  }
};

struct RowState {  // of the softmax so far
  float max[kQueryBlock], sum[kQueryBlock];
};

// kRows rows of scores -> weights exp2(score * factor - max), in place (as pairs: bf16, two to a
// word), zero for the rest of `tile`, the keys that the rows summed together see. Dropped weights
// count in the sum, but become zero.
template <bool kPairs, int kRows>
void softmax_rows(float* scores, const Interval* keys, Interval tile, float factor,
                  float* max_so_far, float* sum_so_far, float* out, int64_t pitch,
                  const uint64_t (*dropped)[kKeyBlock / 64]) {
  const int64_t start = tile.lo / kLanes * kLanes;
  Interval full{round_up(keys[kRows - 1].lo, kLanes), keys[0].hi / kLanes * kLanes};
  if (full.empty()) full = {start, start};
  const auto each_vector = [&](const auto& whole, const auto& part) PYGPT_LAMBDA {
    for (int64_t j = start; j < full.lo; j += kLanes)
      unroll<kRows>([&](auto r) PYGPT_LAMBDA { part(r, j); });
    for (int64_t j = full.lo; j < full.hi; j += kLanes)
      unroll<kRows>([&](auto r) PYGPT_LAMBDA { whole(r, j); });
    for (int64_t j = full.hi; j < tile.hi; j += kLanes)
      unroll<kRows>([&](auto r) PYGPT_LAMBDA { part(r, j); });
  };

  const F32 lowest = broadcast(-INFINITY), zero = broadcast(0.0f);
  F32 highest[kRows];
  unroll<kRows>([&](auto r) PYGPT_LAMBDA { highest[r] = lowest; });
  each_vector(
      [&](auto r, int64_t j)
          PYGPT_LAMBDA { highest[r] = max(highest[r], load(scores + r * kScorePitch + j)); },
      [&](auto r, int64_t j) PYGPT_LAMBDA {
        const F32 x = load(scores + r * kScorePitch + j);
        highest[r] = max(highest[r], select(lanes_within(j, keys[r]), x, lowest));
      });
  F32 shift[kRows], total[kRows];
  unroll<kRows>([&](auto r) PYGPT_LAMBDA {
    const float row_max = max_lane(highest[r]) * factor;
    if (row_max > max_so_far[r]) {
      if (sum_so_far[r] > 0.0f) {
        const F32 shrink = exp2(broadcast(max_so_far[r] - row_max));
        sum_so_far[r] *= first_lane(shrink);
        for (int64_t d = 0; d < pitch; d += kLanes) {
          store(out + r * pitch + d, load(out + r * pitch + d) * shrink);
        }
      }
      max_so_far[r] = row_max;
    }
    shift[r] = broadcast(-max_so_far[r]);
    total[r] = zero;
  });
  const F32 f = broadcast(factor);
  const auto put = [&](auto r, int64_t j, F32 p) PYGPT_LAMBDA {
    float* row = scores + r * kScorePitch;
    total[r] = total[r] + p;
    if (dropped) p = select(dropped_lanes(dropped[r], j), zero, p);
    if constexpr (kPairs) {
      store_bf16(reinterpret_cast<uint16_t*>(row) + j, p);
    } else {
      store(row + j, p);
    }
  };
  const auto weight = [&](auto r, int64_t j) PYGPT_LAMBDA {
    const F32 x = fma(load(scores + r * kScorePitch + j), f, shift[r]);
    return kPairs ? exp2_coarse(x) : exp2(x);
  };
  each_vector([&](auto r, int64_t j) PYGPT_LAMBDA { put(r, j, weight(r, j)); },
              [&](auto r, int64_t j) PYGPT_LAMBDA {
                put(r, j, select(lanes_within(j, keys[r]), weight(r, j), zero));
              });
  unroll<kRows>([&](auto r) PYGPT_LAMBDA { sum_so_far[r] += sum(total[r]); });
}

// Queries [first, first + rows) of one head; `packed` is the first key in w.keys and w.values, a
// multiple of kPanel.
template <bool kPairs>
void forward_block(const Call& call, const ForwardWork& w, int64_t packed, int64_t b, int64_t head,
                   int64_t first, int64_t rows) {
  constexpr int64_t kWord = kPairs ? 2 : 1;
  const AttentionArgs& a = call.a;
  const Visible visible = call.visible(b);
  const bool dropout = a.dropout_p > 0;
  uint64_t dropped[kSoftmaxRows][kKeyBlock / 64];
  RowState state;
  for (int64_t i = 0; i < kQueryBlock; ++i) state.max[i] = -INFINITY, state.sum[i] = 0.0f;
  std::memset(w.out, 0, rows * call.pitch * sizeof(float));
  copy_words<kPairs>(call, a.q, b, first, head, rows, w.queries);

  const Interval all = visible.of_rows(first, first + rows);
  for (int64_t k0 = max(all.lo / kKeyBlock * kKeyBlock, packed); k0 < all.hi; k0 += kKeyBlock) {
    const int64_t k1 = min(k0 + kKeyBlock, all.hi);
    // Keys of rows [r, r + n), counted from k0.
    const auto seen = [&](int64_t r, int64_t n) PYGPT_LAMBDA {
      const Interval keys = within(visible.of_rows(first + r, first + r + n), k0, k1);
      return Interval{keys.lo - k0, keys.hi - k0};
    };
    for (int64_t r = 0; r < rows; r += kScoreRows) {
      const int64_t n = min(kScoreRows, rows - r);
      const Interval keys = seen(r, n);
      if (keys.empty()) continue;
      const int64_t p = keys.lo / kPanel * kPanel;
      score_tiles<kPairs>(static_cast<int>(n), keys.hi - p,
                          {w.queries + r * call.word_pitch, call.word_pitch, 1},
                          w.keys + (k0 - packed + p) * call.words, call.words, call.score_step,
                          w.scores + p, kScorePitch);
      for (int64_t t = 0; t < n; t += kSumRows) {
        const int64_t tile_rows = min(kSumRows, n - t);
        float* scores = w.scores + t * kScorePitch;
        Interval tile = seen(r + t, tile_rows);
        if (tile.empty()) continue;
        tile = {tile.lo / kWord * kWord, round_up(tile.hi, kWord)};
        const auto softmax = [&]<int kRows>(std::integral_constant<int, kRows>,
                                            int64_t i) PYGPT_LAMBDA {
          Interval row_keys[kRows];
          for (int64_t j = 0; j < kRows; ++j) {
            row_keys[j] = seen(r + t + i + j, 1);
            if (dropout)
              find_dropped(call, b, head, first + r + t + i + j, k0, tile.hi, dropped[j]);
          }
          const int64_t row = r + t + i;
          softmax_rows<kPairs, kRows>(scores + i * kScorePitch, row_keys, tile, call.factor,
                                      state.max + row, state.sum + row, w.out + row * call.pitch,
                                      call.pitch, dropout ? dropped : nullptr);
        };
        int64_t i = 0;
        for (; i + kSoftmaxRows <= tile_rows; i += kSoftmaxRows) {
          softmax(std::integral_constant<int, kSoftmaxRows>(), i);
        }
        for (; i < tile_rows; ++i) softmax(std::integral_constant<int, 1>(), i);
        // out += weights * values
        for (int64_t d = 0; d < call.pitch; d += kSumVecs * kLanes) {
          const int vecs = static_cast<int>(min(kSumVecs, (call.pitch - d) / kLanes));
          for (int64_t s = tile.lo; s < tile.hi; s += kSumBlock * kWord) {
            sum_tile<kPairs>(static_cast<int>(tile_rows), vecs,
                             {scores + s / kWord, kScorePitch, 1},
                             w.values + (k0 - packed + s) / kWord * w.value_pitch + d,
                             w.value_pitch, min(kSumBlock, (tile.hi - s) / kWord),
                             w.out + (r + t) * call.pitch + d, call.pitch);
          }
        }
      }
    }
  }
  const float keep = static_cast<float>(1.0 - a.dropout_p);
  for (int64_t i = 0; i < rows; ++i) {
    const bool any = state.sum[i] != 0.0f;  // a query without keys gets zeros
    write_rows(a.dtype, w.out + i * call.pitch, call.pitch, 1, a.dim,
               any ? 1.0f / (state.sum[i] * keep) : 0.0f, call.at(a.out, b, first + i, head), 0);
  }
  if (!a.lse) return;
  float* lse = a.lse + (b * a.heads + head) * a.queries + first;
  for (int64_t i = 0; i < rows; i += kLanes) {
    store_first(lse + i, log2_of_sum(load(state.max + i), load(state.sum + i)),
                static_cast<int>(rows - i));
  }
}

// All heads of a group over queries [first, last).
template <bool kPairs>
void forward_task(const Call& call, int64_t b, int64_t kv_head, int64_t first, int64_t last) {
  const AttentionArgs& a = call.a;
  const Interval all = call.visible(b).of_rows(first, last);
  const int64_t packed = all.lo / kPanel * kPanel, count = max(all.hi - packed, 0);
  ForwardWork w;
  ForwardWork::lay_out(call, count, task_scratch(ForwardWork::lay_out(call, count, nullptr, w)), w);
  pack_panels<kPairs>(a.dtype, call.at(a.k, b, packed, kv_head), a.k.row * call.element, count,
                      a.dim, w.keys);
  w.value_pitch = call.pitch;
  if (a.dtype == DType::kFloat32 && call.pitch == a.dim && count <= kInPlace) {
    w.values = reinterpret_cast<float*>(call.at(a.v, b, packed, kv_head));
    w.value_pitch = a.v.row;
  } else {
    copy_sums<kPairs>(call, a.v, b, packed, kv_head, count, w.values);
  }
  for (int64_t head = kv_head * call.group; head < (kv_head + 1) * call.group; ++head) {
    for (int64_t row = first; row < last; row += kQueryBlock) {
      forward_block<kPairs>(call, w, packed, b, head, row, min(kQueryBlock, last - row));
    }
  }
}

}  // namespace

void attention_forward(const AttentionArgs& a) {
  Call call = describe(a);
  if (decodes(call)) return decode(call);
  lay_out_masks(a, call_scratch(lay_out_masks(a, nullptr, call)), call);
  const int64_t work = visible_pairs(call) * a.dim;
  // A task packs the keys it needs, so heads are cut into pieces only where there are few of them.
  const int64_t blocks = (a.queries + kQueryBlock - 1) / kQueryBlock, heads = a.batch * a.kv_heads;
  const int64_t pieces = max(1, min(blocks / 2, (3 * num_threads() + heads - 1) / heads));
  run_tasks(heads * pieces, work + heads * pieces * kTaskRows * a.dim, [&](int64_t task, int) {
    // Neighbours, of one thread, share a head's keys. Later pieces see more of them: they are
    // shorter, and go first. Equal areas under the diagonal.
    const int64_t head = task / pieces, piece = pieces - 1 - task % pieces;
    const auto cut = [&](int64_t i) {
      const double share = std::sqrt(static_cast<double>(i) / static_cast<double>(pieces));
      return i == pieces ? a.queries
                         : static_cast<int64_t>(share * static_cast<double>(blocks)) * kQueryBlock;
    };
    const int64_t first = cut(piece), last = cut(piece + 1);
    if (first >= last) return;
    if (kHasPairs && call.pairs) {
      forward_task<kHasPairs>(call, head / a.kv_heads, head % a.kv_heads, first, last);
    } else {
      forward_task<false>(call, head / a.kv_heads, head % a.kv_heads, first, last);
    }
  });
}

}  // namespace pygpt::PYGPT_ISA_NAMESPACE
