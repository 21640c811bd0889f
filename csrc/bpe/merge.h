// Byte-pair merging: lowest rank first, leftmost first.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace pygpt {

// Symbols 0 to 255 are the bytes; later ones are made by rules. A rule's rank is its priority.
class MergeRules {
 public:
  static constexpr uint32_t kNone = (1u << 21) - 1;  // no rule; also the limit of symbols and ranks

  explicit MergeRules(size_t expected_rules);

  // False if the pair has a rule already.
  bool add(uint32_t left, uint32_t right, uint32_t rank, uint32_t result);

  uint32_t rank_of_bytes(uint8_t left, uint8_t right) const {
    return byte_pairs_[left << 8 | right];
  }
  // At least one of the two is no byte.
  uint32_t rank_of_pair(uint32_t left, uint32_t right) const {
    const uint64_t key = key_of(left, right), hash = key * kFactor;
    const uint32_t tag = tagged(hash, 0);
    // Four slots at once: how many one must look at cannot be foretold.
    for (const Slots* slots = &pairs_[bucket(hash)];; slots = after(slots)) {
      const auto equal = reinterpret_cast<Halves>((slots->rank >> kRankBits) == tag >> kRankBits);
      if (equal[0] | equal[1]) {
        for (int i = 0; i < 4; ++i) {
          const uint32_t rank = slots->rank[i] & kNone;
          if (rank < parts_.size() && parts_[rank] == key) return rank;
        }
      }
      if (slots->rank[3] == kEmpty) [[likely]]
        return kNone;
    }
  }
  uint32_t result(uint32_t rank) const { return in_order_ ? 256 + rank : results_[rank]; }

  // The pairs of symbols by rank; kNone twice where a rank has no rule.
  std::vector<std::pair<uint32_t, uint32_t>> pairs() const;

  // Merges `size` bytes into symbols; `out` has room for `size`. Returns how many came out.
  // Time is O(size log size); short inputs take a quadratic loop that is faster for them.
  size_t merge(const uint8_t* bytes, size_t size, uint32_t* out) const;

 private:
  static constexpr uint64_t kFactor = 0x9E3779B97F4A7C15u;
  static constexpr uint32_t kEmpty = ~0u;
  static constexpr int kRankBits = 21;
  static uint64_t key_of(uint32_t left, uint32_t right) { return uint64_t{left} << 32 | right; }
  using Four = uint32_t __attribute__((vector_size(16)));
  using Halves = uint64_t __attribute__((vector_size(16)));
  struct Slots {  // filled from the first
    Four rank = {kEmpty, kEmpty, kEmpty, kEmpty};
  };
  size_t bucket(uint64_t hash) const { return (hash >> 32) * pairs_.size() >> 32; }
  const Slots* after(const Slots* slots) const {
    return slots == &pairs_.back() ? pairs_.data() : slots + 1;
  }
  static uint32_t tagged(uint64_t hash, uint32_t rank) {
    return static_cast<uint32_t>(hash) >> kRankBits << kRankBits | rank;
  }
  size_t merge_short(const uint8_t* bytes, size_t size, uint32_t* out) const;
  size_t merge_long(const uint8_t* bytes, size_t size, uint32_t* out) const;

  std::vector<uint32_t> byte_pairs_;  // rank, or kNone, of each pair of bytes
  std::vector<Slots> pairs_;          // open addressing: some bits of the hash, and the rank
  std::vector<uint64_t> parts_;       // rank -> key of its pair
  std::vector<uint32_t> results_;     // rank -> symbol
  bool in_order_ = true;              // rank r makes symbol 256 + r
};

}  // namespace pygpt
