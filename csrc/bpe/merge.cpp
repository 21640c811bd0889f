#include "bpe/merge.h"

#include <algorithm>
#include <queue>

namespace pygpt {
namespace {

constexpr size_t kShort = 128;

}  // namespace

MergeRules::MergeRules(size_t expected_rules)
    : byte_pairs_(65536, kNone), pairs_(expected_rules / 2 + 4) {}

bool MergeRules::add(uint32_t left, uint32_t right, uint32_t rank, uint32_t result) {
  if (left < 256 && right < 256) {
    uint32_t& entry = byte_pairs_[left << 8 | right];
    if (entry != kNone) return false;
    entry = rank;
  } else {
    if (rank_of_pair(left, right) != kNone) return false;
    const uint64_t hash = key_of(left, right) * kFactor;
    const Slots* slots = &pairs_[bucket(hash)];
    while (slots->rank[3] != kEmpty) slots = after(slots);
    Four& ranks = pairs_[slots - pairs_.data()].rank;
    int free = 0;
    while (ranks[free] != kEmpty) ++free;
    ranks[free] = tagged(hash, rank);
  }
  if (parts_.size() <= rank) {
    parts_.resize(rank + 1, key_of(kNone, kNone));
    results_.resize(rank + 1);
  }
  parts_[rank] = key_of(left, right);
  results_[rank] = result;
  in_order_ = in_order_ && result == 256 + rank;
  return true;
}

std::vector<std::pair<uint32_t, uint32_t>> MergeRules::pairs() const {
  std::vector<std::pair<uint32_t, uint32_t>> pairs;
  for (const uint64_t key : parts_) {
    pairs.emplace_back(static_cast<uint32_t>(key >> 32), static_cast<uint32_t>(key));
  }
  return pairs;
}

size_t MergeRules::merge(const uint8_t* bytes, size_t size, uint32_t* out) const {
  if (size <= kShort) return merge_short(bytes, size, out);
  return merge_long(bytes, size, out);
}

size_t MergeRules::merge_short(const uint8_t* bytes, size_t size, uint32_t* out) const {
  // best[i] = rank << 32 | i for the pair that begins at byte i, so that the minimum names the pair
  // and ties go to the left; positions never move, absorbed ones become kNoPair.
  constexpr uint64_t kNoPair = ~uint64_t{0};
  uint32_t symbol[kShort];
  uint64_t best[kShort];
  uint8_t next[kShort + 1], previous[kShort + 1];
  const auto pair = [](uint32_t rank, size_t i) {
    return rank == kNone ? kNoPair : uint64_t{rank} << 32 | i;
  };
  for (size_t i = 0; i < size; ++i) {
    symbol[i] = bytes[i];
    next[i] = static_cast<uint8_t>(i + 1);
    previous[i + 1] = static_cast<uint8_t>(i);
    best[i] = pair(i + 1 < size ? rank_of_bytes(bytes[i], bytes[i + 1]) : kNone, i);
  }
  for (;;) {
    uint64_t even = kNoPair, odd = kNoPair;
    for (size_t i = 0; i + 1 < size; i += 2) {
      even = std::min(even, best[i]);
      odd = std::min(odd, best[i + 1]);
    }
    const uint64_t lowest = std::min(even, odd);
    if (lowest == kNoPair) break;
    const size_t i = lowest & 0xFFFFFFFF, absorbed = next[i], after = next[absorbed];
    symbol[i] = result(static_cast<uint32_t>(lowest >> 32));
    best[absorbed] = kNoPair;
    next[i] = static_cast<uint8_t>(after);
    previous[after] = static_cast<uint8_t>(i);
    best[i] = pair(after < size ? rank_of_pair(symbol[i], symbol[after]) : kNone, i);
    if (i > 0) best[previous[i]] = pair(rank_of_pair(symbol[previous[i]], symbol[i]), previous[i]);
  }
  size_t count = 0;
  for (size_t i = 0; i < size; i = next[i]) out[count++] = symbol[i];
  return count;
}

size_t MergeRules::merge_long(const uint8_t* bytes, size_t size, uint32_t* out) const {
  struct Candidate {
    uint32_t rank;
    size_t at;
    bool operator>(const Candidate& b) const { return rank != b.rank ? rank > b.rank : at > b.at; }
  };
  // Its rank is that of the pair that begins here; a candidate whose rank differs is out of date.
  struct Node {
    uint32_t symbol, rank;
    size_t next, previous;
  };
  std::vector<Node> nodes(size + 1);
  std::vector<Candidate> initial;
  for (size_t i = 0; i < size; ++i) {
    const uint32_t rank = i + 1 < size ? rank_of_bytes(bytes[i], bytes[i + 1]) : kNone;
    nodes[i] = {bytes[i], rank, i + 1, i - 1};
    if (rank != kNone) initial.push_back({rank, i});
  }
  std::priority_queue<Candidate, std::vector<Candidate>, std::greater<>> queue(std::greater<>{},
                                                                               std::move(initial));
  const auto update = [&](size_t i, size_t j) {
    nodes[i].rank = j < size ? rank_of_pair(nodes[i].symbol, nodes[j].symbol) : kNone;
    if (nodes[i].rank != kNone) queue.push({nodes[i].rank, i});
  };
  while (!queue.empty()) {
    const Candidate top = queue.top();
    queue.pop();
    const size_t i = top.at;
    if (nodes[i].rank != top.rank) continue;
    const size_t absorbed = nodes[i].next, after = nodes[absorbed].next;
    nodes[i].symbol = result(top.rank);
    nodes[absorbed].rank = kNone;
    nodes[i].next = after;
    nodes[after].previous = i;
    update(i, after);
    if (i > 0) update(nodes[i].previous, i);
  }
  size_t count = 0;
  for (size_t i = 0; i < size; i = nodes[i].next) out[count++] = nodes[i].symbol;
  return count;
}

}  // namespace pygpt
