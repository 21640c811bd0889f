// Training: count the distinct pieces of a corpus, then merge the most frequent pair, again and
// again.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "bpe/split.h"
#include "bpe/vocabulary.h"

namespace pygpt {

// Distinct pieces and how often each occurs.
class PieceCounts {
 public:
  void add_text(Pattern pattern, std::string_view text);
  void add_piece(std::string_view piece, uint64_t count);
  void add_all(const PieceCounts& other);
  size_t distinct() const { return used_ + long_.size(); }

  template <class Visit>
  void each(const Visit& visit) const {
    for (const Slot& slot : slots_) {
      if (slot.count) visit(reinterpret_cast<const uint8_t*>(&slot.key), size_of(slot), slot.count);
    }
    for (const auto& [piece, count] : long_) {
      visit(reinterpret_cast<const uint8_t*>(piece.data()), piece.size(), count);
    }
  }

 private:
  struct Slot {
    ShortKey key;
    uint64_t count;
  };
  static size_t size_of(const Slot& slot) { return slot.key.high >> 56; }
  void add_short(ShortKey key, uint64_t count);
  void grow();

  std::vector<Slot> slots_;
  size_t used_ = 0;
  int shift_ = 64;
  std::unordered_map<std::string, uint64_t> long_;
};

// Merges in order, each a pair of ids; ids 0 to 255 are the bytes in GPT-2's order, 256 + i is made
// by merge i. The pair of the highest count goes first, of equals the one of smallest ids, which is
// the order of Hugging Face's trainer. Stops early when no pair occurs min_frequency times.
// `progress(done)` is called about every 256 merges and may throw to stop.
std::vector<std::pair<uint32_t, uint32_t>> train_merges(
    const PieceCounts& pieces, size_t merges, uint64_t min_frequency,
    const std::function<void(size_t)>& progress);

}  // namespace pygpt
