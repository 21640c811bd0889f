// Byte-pair merging: lowest rank first, leftmost first.
#pragma once

#include <cstddef>
#include <cstdint>
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
    const uint64_t key = uint64_t{left} << 21 | right;
    for (size_t i = slot(key);; i = (i + 1) & mask_) {
      if (pairs_[i] >> 21 == key) return static_cast<uint32_t>(pairs_[i] & kNone);
      if (pairs_[i] == kEmpty) return kNone;
    }
  }
  uint32_t result(uint32_t rank) const { return results_[rank]; }

  // Merges `size` bytes into symbols; `out` has room for `size`. Returns how many came out.
  // Time is O(size log size); short inputs take a quadratic loop that is faster for them.
  size_t merge(const uint8_t* bytes, size_t size, uint32_t* out) const;

 private:
  static constexpr uint64_t kEmpty = ~uint64_t{0};
  size_t slot(uint64_t key) const { return key * 0x9E3779B97F4A7C15u >> shift_; }
  size_t merge_short(const uint8_t* bytes, size_t size, uint32_t* out) const;
  size_t merge_long(const uint8_t* bytes, size_t size, uint32_t* out) const;

  std::vector<uint32_t> byte_pairs_;  // rank, or kNone, of each pair of bytes
  std::vector<uint64_t> pairs_;       // open addressing: left << 42 | right << 21 | rank
  std::vector<uint32_t> results_;     // rank -> symbol
  size_t mask_;
  int shift_;
};

}  // namespace pygpt
