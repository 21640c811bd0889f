// One token per row of logits: temperature, top-k, top-p, min-p, penalties; no sort.
//
// The contract (pygpt/reference.py is its slow twin) leaves no freedom to rounding: a token's
// weight is the integer floor(2^(40 - u)), u = (max - z) * log2(e) / temperature in float32,
// through a fixed polynomial of separate multiplications and additions; sums of integers do not
// depend on their order. So every instruction set gives the same token. The loops are plain C++
// that the compiler vectorises; only selection is scalar, and it sees few elements.
//
// Top-k and top-p look only into blocks whose maximum reaches that of the k-th largest block, and
// leave few candidates unless the distribution is flat; a histogram of all weights costs as much as
// the rest together. Weights are never stored, but found again in the block that is drawn from.
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "core/parallel.h"
#include "core/scratch.h"
#include "cpu/kernels.h"
#include "cpu/vec.h"

namespace pygpt::PYGPT_ISA_NAMESPACE {
namespace {

constexpr int kBlock = 64;       // elements whose maximum and whose weight sum are kept
constexpr int kWeightBits = 40;  // the most likely token weighs 2^40
constexpr int kBuckets = 512;    // of u: 32 per octave, from 2^-10 to 2^6
constexpr int kLowestBucket = (127 - 10) << 5;
constexpr int32_t kPositiveInfinity = 0x7f800000;
constexpr int32_t kNegativeInfinity = static_cast<int32_t>(0xff800000) ^ 0x7fffffff;

template <class To, class From>
inline To bit_cast(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof(y));
  return y;
}

// Float bits <-> integers of the same order (an involution). -0 must have become +0 before.
inline int32_t ordered(int32_t bits) { return bits ^ ((bits >> 31) & 0x7fffffff); }

inline float to_float(float x) { return x; }

struct BFloat16 {
  uint16_t bits;
};
inline float to_float(BFloat16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

struct Float16 {
  uint16_t bits;
};
inline float to_float(Float16 x) {
  const uint32_t magnitude = (x.bits & 0x7fffu) << 13;
  const float scaled = bit_cast<float>(magnitude) * 0x1p112f;  // exact, subnormals included
  const uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;
  return bit_cast<float>(bit_cast<uint32_t>(scaled) | special | (x.bits & 0x8000u) << 16);
}

struct Item {
  int32_t key;
  int64_t mass;
};

// The key at which the mass of items, taken from the greatest key down, first reaches `need`, and
// the mass of the items with greater keys. A radix select; destroys `items`.
struct Cut {
  int32_t key;
  int64_t above;
};
Cut select(Item* items, int64_t n, int64_t need) {
  int64_t above = 0;
  for (;;) {
    int32_t low = items[0].key, high = items[0].key;
    for (int64_t i = 1; i < n; ++i) {
      low = items[i].key < low ? items[i].key : low;
      high = items[i].key > high ? items[i].key : high;
    }
    if (low == high) return {low, above};
    const uint32_t range = static_cast<uint32_t>(high) - static_cast<uint32_t>(low);
    const int width = 32 - __builtin_clz(range);
    const int shift = width > 8 ? width - 8 : 0;
    const auto bucket = [&](int32_t key) {
      return (static_cast<uint32_t>(high) - static_cast<uint32_t>(key)) >> shift;
    };
    int64_t mass[256] = {};
    for (int64_t i = 0; i < n; ++i) mass[bucket(items[i].key)] += items[i].mass;
    uint32_t b = 0;
    while (b < range >> shift && above + mass[b] < need) above += mass[b++];
    int64_t kept = 0;
    for (int64_t i = 0; i < n; ++i) {
      if (bucket(items[i].key) == b) items[kept++] = items[i];
    }
    n = kept;
  }
}

struct Row {
  // Scratch: keys of the candidates in index order, their token ids once some were left out,
  // maximum or sum per block, and room for selection.
  int32_t* keys;
  int32_t* ids;
  int64_t* blocks;
  Item* items;
};

int64_t blocks_of(int64_t n) { return (n + kBlock - 1) / kBlock; }

Row take_scratch(int64_t vocab) {
  const auto padded = static_cast<size_t>(blocks_of(vocab) * kBlock);
  auto* p = static_cast<char*>(task_scratch(padded * (sizeof(Item) + 2 * sizeof(int32_t)) +
                                            padded / kBlock * sizeof(int64_t)));
  Row row;
  const auto take = [&p](auto*& array, size_t n) {
    array = reinterpret_cast<std::remove_reference_t<decltype(array)>>(p);
    p += n * sizeof(*array);
  };
  take(row.items, padded);
  take(row.blocks, padded / kBlock);
  take(row.keys, padded);
  take(row.ids, padded);
  return row;
}

// Maximum of each block into row.blocks; false where the row has a NaN, +inf, or no finite logit.
// With `read` the keys are made on the way.
template <class Read>
bool block_maxima(const Row& row, int64_t n, int32_t* max, const Read& read) {
  int32_t greatest = kNegativeInfinity, least = kPositiveInfinity;
  const auto block = [&](int64_t first, int64_t size) PYGPT_LAMBDA {
    int32_t high = kNegativeInfinity, low = kPositiveInfinity;
    for (int64_t i = first; i < first + size; ++i) {
      const int32_t key = read(i);
      row.keys[i] = key;
      high = key > high ? key : high;
      low = key < low ? key : low;
    }
    row.blocks[first / kBlock] = high;
    greatest = high > greatest ? high : greatest;
    least = low < least ? low : least;
  };
  const int64_t whole = n / kBlock * kBlock;
  for (int64_t first = 0; first < whole; first += kBlock) block(first, kBlock);
  if (whole < n) block(whole, n - whole);
  for (int64_t i = n; i < blocks_of(n) * kBlock; ++i) row.keys[i] = kNegativeInfinity;
  *max = greatest;
  return least >= kNegativeInfinity && greatest < kPositiveInfinity && greatest > kNegativeInfinity;
}

// Keys of one row, with bias and penalties, and their block maxima.
template <class T>
bool read_keys(const SampleArgs& args, int64_t r, const SampleParameters& p, const Row& row,
               int32_t* max) {
  const T* logits = static_cast<const T*>(args.logits) + r * args.logits_stride;
  const int64_t n = args.vocab;
  const auto key_of = [](float z) { return ordered(bit_cast<int32_t>(z + 0.0f)); };
  bool fine;
  if (args.bias) {
    const float* bias = args.bias + r * args.bias_stride;
    fine = block_maxima(
        row, n, max, [&](int64_t i) PYGPT_LAMBDA { return key_of(to_float(logits[i]) + bias[i]); });
  } else {
    fine = block_maxima(row, n, max,
                        [&](int64_t i) PYGPT_LAMBDA { return key_of(to_float(logits[i])); });
  }
  if (!args.history_length) return fine;
  const int64_t* history = args.history + r * args.history_length;
  const auto repetition = static_cast<float>(p.repetition_penalty);
  const auto presence = static_cast<float>(p.presence_penalty);
  const auto frequency = static_cast<float>(p.frequency_penalty);
  auto* count = row.ids;  // free until top-k
  for (int64_t j = 0; j < args.history_length; ++j) {
    if (history[j] >= 0) count[history[j]] = 0;
  }
  for (int64_t j = 0; j < args.history_length; ++j) {
    if (history[j] >= 0) ++count[history[j]];
  }
  for (int64_t j = 0; j < args.history_length; ++j) {
    const int64_t i = history[j];
    if (i < 0 || !count[i]) continue;
    float z = bit_cast<float>(ordered(row.keys[i]));
    z = z > 0.0f ? z / repetition : z * repetition;
    z = z - (presence + frequency * static_cast<float>(count[i]));
    row.keys[i] = key_of(z);
    count[i] = 0;
  }
  return block_maxima(row, n, max, [&](int64_t i) PYGPT_LAMBDA { return row.keys[i]; });
}

// The k-th greatest block maximum, which at least k keys reach; every key does where k is too many.
int32_t floor_of_blocks(const Row& row, int64_t blocks, int64_t k) {
  if (k > blocks) return kNegativeInfinity;
  for (int64_t b = 0; b < blocks; ++b) row.items[b] = {static_cast<int32_t>(row.blocks[b]), 1};
  return select(row.items, blocks, k).key;
}

// Where the keys from `floor` on stand, in order, as the keys of row.items; returns how many.
int64_t find_reaching(const Row& row, int64_t n, int32_t floor) {
  int64_t count = 0;
  for (int64_t b = 0; b < blocks_of(n); ++b) {
    if (row.blocks[b] < floor) continue;
    uint64_t reach = 0;
    for (int i = 0; i < kBlock; i += kLanes) {
      const I32 keys = load(row.keys + b * kBlock + i);
      reach |= static_cast<uint64_t>(bits(keys > broadcast(floor - 1))) << i;
    }
    const auto take = [&]() PYGPT_LAMBDA {
      row.items[count].key = static_cast<int32_t>(b * kBlock + (std::countr_zero(reach) & 63));
      count += reach != 0;
      reach &= reach - 1;
    };
    take();  // two without a branch that nobody could foresee: few blocks have more
    take();
    while (reach) take();
  }
  return count;
}

// Leaves the keys above `key` and the first `ties` equal to it, in index order, and their tokens in
// row.ids, where they are already if keys were left out before; returns how many.
int64_t gather(const Row& row, int64_t n, int32_t key, int64_t ties, bool left_out) {
  const int64_t count = find_reaching(row, n, key);
  int64_t kept = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t place = row.items[i].key, candidate = row.keys[place];
    row.keys[kept] = candidate;
    row.ids[kept] = left_out ? row.ids[place] : place;
    kept += candidate > key || ties > 0;
    ties -= candidate == key;
  }
  for (int64_t i = kept; i < blocks_of(kept) * kBlock; ++i) row.keys[i] = kNegativeInfinity;
  return kept;
}

int64_t keep_top_k(const Row& row, int64_t vocab, int64_t k) {
  const int64_t n = find_reaching(row, vocab, floor_of_blocks(row, blocks_of(vocab), k));
  for (int64_t i = 0; i < n; ++i) row.items[i] = {row.keys[row.items[i].key], 1};
  const Cut cut = select(row.items, n, k);
  return gather(row, vocab, cut.key, k - cut.above, false);
}

struct Weigher {
  float max, scale;  // scale: log2(e) / temperature

  // Weights of one block of keys, from u, which is returned too.
  void operator()(const int32_t* keys, int64_t* weights, float* u) const {
    for (int i = 0; i < kBlock; ++i) {
      const float x = (max - bit_cast<float>(ordered(keys[i]))) * scale;
      u[i] = x < 48.0f ? x : 48.0f;
    }
    for (int i = 0; i < kBlock; ++i) {
      const auto whole = static_cast<int32_t>(u[i]);
      const float f = u[i] - static_cast<float>(whole);
      float p = -0x1.ef66d2p-11f;  // 2^-f on [0, 1)
      p = p * f + 0x1.2da7d6p-7f;
      p = p * f + -0x1.c4fef8p-5f;
      p = p * f + 0x1.ebe392p-3f;
      p = p * f + -0x1.62e3bcp-1f;
      p = p * f + 1.0f;
      const auto mantissa = static_cast<int32_t>(p * 0x1p24f);
      // Unsigned: AVX2 has no arithmetic shift of 64 bits by lane.
      weights[i] = static_cast<int64_t>(
          (static_cast<uint64_t>(static_cast<uint32_t>(mantissa)) << (kWeightBits - 24)) >> whole);
    }
  }
  int64_t of(int32_t key) const {
    int32_t keys[kBlock];
    int64_t weights[kBlock];
    float u[kBlock];
    for (int32_t& k : keys) k = key;
    (*this)(keys, weights, u);
    return weights[0];
  }
  // The sum of a block's weights, of those from `least`.
  int64_t sum(const int32_t* keys, int64_t least) const {
    int64_t weights[kBlock], total = 0;
    float u[kBlock];
    (*this)(keys, weights, u);
    if (least <= 0) {
      for (int i = 0; i < kBlock; ++i) total += weights[i];
    } else {
      for (int i = 0; i < kBlock; ++i) total += weights[i] >= least ? weights[i] : 0;
    }
    return total;
  }
};

// Leaves the fewest greatest keys whose weight reaches top_p of all, of equal ones the first.
int64_t keep_top_p(const Row& row, int64_t n, const Weigher& weigher, double top_p, bool left_out) {
  const int64_t blocks = blocks_of(n);
  int64_t weights[kBlock];
  float u[kBlock];
  int64_t total = 0, listed = 0, above = 0, count = 0;
  for (int64_t b = 0; b < blocks; ++b) total += weigher.sum(row.keys + b * kBlock, 0);
  const auto wanted = static_cast<int64_t>(std::ceil(top_p * static_cast<double>(total)));
  const int64_t need = wanted < 1 ? 1 : wanted > total ? total : wanted;
  // Of most distributions one key in a hundred is enough, or one in ten: those from the least block
  // maximum on.
  for (const int64_t reaching : {(3 * blocks + 4) / 5, blocks}) {
    count = find_reaching(row, n, floor_of_blocks(row, blocks, reaching));
    listed = 0;
    for (int64_t first = 0; first < count; first += kBlock) {
      const int64_t some = count - first < kBlock ? count - first : kBlock;
      int32_t keys[kBlock];
      for (int64_t i = 0; i < some; ++i) keys[i] = row.keys[row.items[first + i].key];
      for (int64_t i = some; i < kBlock; ++i) keys[i] = kNegativeInfinity;
      weigher(keys, weights, u);
      for (int64_t i = 0; i < some; ++i) {
        row.items[first + i] = {keys[i], weights[i]};
        listed += weights[i];
      }
    }
    if (listed >= need || listed < need / 2) break;
  }
  if (listed < need) {               // a flat one: a histogram of u, then the items of one bucket
    int64_t mass[4][kBuckets] = {};  // four, so that equal neighbours do not wait for each other
    uint16_t buckets[kBlock];
    const auto each_block = [&](const auto& f) {
      for (int64_t b = 0; b < blocks; ++b) {
        weigher(row.keys + b * kBlock, weights, u);
        for (int i = 0; i < kBlock; ++i) {
          const int32_t bucket = (bit_cast<int32_t>(u[i]) >> 18) - kLowestBucket;
          buckets[i] = static_cast<uint16_t>(bucket > 0 ? bucket : 0);
        }
        f(row.keys + b * kBlock);
      }
    };
    each_block([&](const int32_t*) {
      for (int i = 0; i < kBlock; ++i) mass[i % 4][buckets[i]] += weights[i];
    });
    int reached = 0;
    for (;; ++reached) {
      const int64_t here =
          mass[0][reached] + mass[1][reached] + mass[2][reached] + mass[3][reached];
      if (above + here >= need) break;
      above += here;
    }
    count = 0;
    each_block([&](const int32_t* keys) {
      for (int i = 0; i < kBlock; ++i) {
        if (buckets[i] == reached) row.items[count++] = {keys[i], weights[i]};
      }
    });
  }
  const Cut cut = select(row.items, count, need - above);
  const int64_t left = need - above - cut.above, each = weigher.of(cut.key);
  return gather(row, n, cut.key, (left + each - 1) / each, left_out);
}

// The first index at which the running sum of weights, of those from `least`, exceeds
// uniform * total.
int64_t draw(const Row& row, int64_t n, const Weigher& weigher, int64_t least, double uniform) {
  int64_t total = 0;
  for (int64_t b = 0; b < blocks_of(n); ++b) {
    row.blocks[b] = weigher.sum(row.keys + b * kBlock, least);
    total += row.blocks[b];
  }
  auto rest = static_cast<int64_t>(uniform * static_cast<double>(total));
  rest = rest < 0 ? 0 : rest < total ? rest : total - 1;
  int64_t b = 0;
  while (rest >= row.blocks[b]) rest -= row.blocks[b++];
  int64_t weights[kBlock];
  float u[kBlock];
  weigher(row.keys + b * kBlock, weights, u);
  for (int64_t i = 0;; ++i) {
    if (weights[i] < least) continue;
    if (rest < weights[i]) return b * kBlock + i;
    rest -= weights[i];
  }
}

template <class T>
int64_t sample_row(const SampleArgs& args, int64_t r) {
  const SampleParameters& p = args.parameters[r * args.parameters_stride];
  const Row row = take_scratch(args.vocab);
  int32_t max;
  if (!read_keys<T>(args, r, p, row, &max)) return -1;
  if (p.temperature == 0.0) {
    int64_t b = 0;
    while (row.blocks[b] != max) ++b;
    int64_t i = b * kBlock;
    while (row.keys[i] != max) ++i;
    return i;
  }
  int64_t n = args.vocab;
  const float scale = 0x1.715476p+0f / static_cast<float>(p.temperature);
  const Weigher weigher{bit_cast<float>(ordered(max)),
                        scale < 0x1.fffffep127f ? scale : 0x1.fffffep127f};
  const bool top_k = p.top_k > 0 && p.top_k < static_cast<double>(n), top_p = p.top_p < 1.0;
  if (top_k) n = keep_top_k(row, n, static_cast<int64_t>(p.top_k));
  if (top_p) {
    const auto same = [&](int64_t i) { return row.keys[i]; };
    if (top_k) block_maxima(row, n, &max, same);
    n = keep_top_p(row, n, weigher, p.top_p, top_k);
  }
  const auto least = static_cast<int64_t>(std::ceil(p.min_p * 0x1p40));
  const int64_t i = draw(row, n, weigher, least, args.uniforms[r]);
  return top_k || top_p ? row.ids[i] : i;
}

}  // namespace

void sample(const SampleArgs& args) {
  parallel_tasks(args.rows, [&](int64_t r, int) {
    switch (args.dtype) {
      case DType::kFloat32:
        args.tokens[r] = sample_row<float>(args, r);
        break;
      case DType::kBFloat16:
        args.tokens[r] = sample_row<BFloat16>(args, r);
        break;
      case DType::kFloat16:
        args.tokens[r] = sample_row<Float16>(args, r);
        break;
    }
  });
}

}  // namespace pygpt::PYGPT_ISA_NAMESPACE
