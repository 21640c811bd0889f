// Training: merge the most frequent pair of a corpus, again and again.
#pragma once

#include <cstdint>
#include <functional>
#include <string_view>
#include <utility>
#include <vector>

#include "bpe/pieces.h"

namespace pygpt {

class MergeTrainer {
 public:
  // Throws ResourceError for pieces that need more than about `memory` bytes.
  explicit MergeTrainer(size_t memory = ~size_t{0});

  void add(std::string_view piece, uint64_t count);  // every distinct piece once

  // Merges in order, each a pair of ids; ids 0 to 255 are the bytes in GPT-2's order, 256 + i is
  // made by merge i. The pair of the highest count goes first, of equals the one of smallest ids,
  // which is the order of Hugging Face's trainer. Stops early when no pair occurs min_frequency
  // times. `progress(done)` is called many times a second and may throw to stop. Once only.
  std::vector<std::pair<uint32_t, uint32_t>> train(size_t merges, uint64_t min_frequency,
                                                   const std::function<void(size_t)>& progress);

 private:
  struct Pair {
    int64_t count;
    uint32_t left, right;
  };
  template <class EachOccurrence>
  void list_words(size_t from, int64_t minimum, const EachOccurrence& each);

  // Words one after the other, each its count (two places), its number of pairs, and the indices of
  // its pairs; merging shortens it in place. A word is known by where it begins.
  std::vector<uint32_t> words_;
  uint64_t pieces_ = 0;
  size_t most_;  // places in words_
  // Every pair that ever occurred. All pairs with a token are found when it is made, and so are all
  // words that they will ever occur in: pair p is in lists_[first_[p] .. first_[p + 1]).
  std::vector<Pair> pairs_;
  std::vector<uint64_t> first_{0};
  std::vector<uint32_t> lists_;
  std::vector<uint32_t> last_;  // of list_words(): the word seen last with each pair
};

}  // namespace pygpt
