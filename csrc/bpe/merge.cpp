#include "bpe/merge.h"

#include <bit>
#include <queue>

namespace pygpt {
namespace {

constexpr size_t kShort = 128;

}  // namespace

MergeRules::MergeRules(size_t expected_rules) : byte_pairs_(65536, kNone) {
  const size_t slots = std::bit_ceil(expected_rules * 2 + 16);
  pairs_.assign(slots, kEmpty);
  mask_ = slots - 1;
  shift_ = 64 - std::countr_zero(slots);
}

bool MergeRules::add(uint32_t left, uint32_t right, uint32_t rank, uint32_t result) {
  if (results_.size() <= rank) results_.resize(rank + 1);
  results_[rank] = result;
  if (left < 256 && right < 256) {
    uint32_t& entry = byte_pairs_[left << 8 | right];
    if (entry != kNone) return false;
    entry = rank;
    return true;
  }
  const uint64_t key = uint64_t{left} << 21 | right;
  size_t i = slot(key);
  for (; pairs_[i] != kEmpty; i = (i + 1) & mask_) {
    if (pairs_[i] >> 21 == key) return false;
  }
  pairs_[i] = key << 21 | rank;
  return true;
}

size_t MergeRules::merge(const uint8_t* bytes, size_t size, uint32_t* out) const {
  if (size <= kShort) return merge_short(bytes, size, out);
  return merge_long(bytes, size, out);
}

size_t MergeRules::merge_short(const uint8_t* bytes, size_t size, uint32_t* out) const {
  // best[i] = rank << 8 | i for the pair that begins at byte i, so that the minimum names the pair
  // and ties go to the left; positions never move, absorbed ones become kNoPair.
  constexpr uint32_t kNoPair = ~0u;
  uint32_t symbol[kShort], best[kShort];
  uint8_t next[kShort + 1], previous[kShort + 1];
  for (size_t i = 0; i < size; ++i) {
    symbol[i] = bytes[i];
    next[i] = static_cast<uint8_t>(i + 1);
    previous[i + 1] = static_cast<uint8_t>(i);
    const uint32_t rank = i + 1 < size ? rank_of_bytes(bytes[i], bytes[i + 1]) : kNone;
    best[i] = rank == kNone ? kNoPair : rank << 8 | static_cast<uint32_t>(i);
  }
  const auto update = [&](uint32_t i, uint32_t j) {
    const uint32_t rank = rank_of_pair(symbol[i], symbol[j]);
    best[i] = rank == kNone ? kNoPair : rank << 8 | i;
  };
  for (;;) {
    uint32_t lowest = kNoPair;
    for (size_t i = 0; i < size; ++i) lowest = best[i] < lowest ? best[i] : lowest;
    if (lowest == kNoPair) break;
    const uint32_t i = lowest & 255, absorbed = next[i], after = next[absorbed];
    symbol[i] = result(lowest >> 8);
    best[absorbed] = kNoPair;
    next[i] = static_cast<uint8_t>(after);
    previous[after] = static_cast<uint8_t>(i);
    if (after < size) {
      update(i, after);
    } else {
      best[i] = kNoPair;
    }
    if (i > 0) update(previous[i], i);
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
  // rank[i] is the current rank of the pair that begins at byte i; a candidate whose rank differs
  // is out of date.
  std::vector<uint32_t> symbol(bytes, bytes + size), rank(size, kNone);
  std::vector<size_t> next(size), previous(size + 1);
  std::vector<Candidate> initial;
  for (size_t i = 0; i < size; ++i) {
    next[i] = i + 1;
    previous[i + 1] = i;
    if (i + 1 < size) rank[i] = rank_of_bytes(bytes[i], bytes[i + 1]);
    if (rank[i] != kNone) initial.push_back({rank[i], i});
  }
  std::priority_queue<Candidate, std::vector<Candidate>, std::greater<>> queue(std::greater<>{},
                                                                               std::move(initial));
  const auto update = [&](size_t i, size_t j) {
    rank[i] = j < size ? rank_of_pair(symbol[i], symbol[j]) : kNone;
    if (rank[i] != kNone) queue.push({rank[i], i});
  };
  while (!queue.empty()) {
    const Candidate top = queue.top();
    queue.pop();
    const size_t i = top.at;
    if (rank[i] != top.rank) continue;
    const size_t absorbed = next[i], after = next[absorbed];
    symbol[i] = result(top.rank);
    rank[absorbed] = kNone;
    next[i] = after;
    previous[after] = i;
    update(i, after);
    if (i > 0) update(previous[i], i);
  }
  size_t count = 0;
  for (size_t i = 0; i < size; i = next[i]) out[count++] = symbol[i];
  return count;
}

}  // namespace pygpt
