#include "bpe/train.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <queue>
#include <string>

#include "core/error.h"

namespace pygpt {
namespace {

constexpr uint32_t kNone = ~0u;
constexpr size_t kHead = 3;  // of a word: count and size

struct Candidate {
  int64_t count;
  uint32_t left, right, pair;
  bool operator<(const Candidate& b) const {
    if (count != b.count) return count < b.count;
    return left != b.left ? left > b.left : right > b.right;
  }
};

}  // namespace

MergeTrainer::MergeTrainer(size_t memory) {
  // The lists of words take about as much as the words, and as much again while they grow.
  most_ = std::min<size_t>(memory / (3 * sizeof(uint32_t)), kNone);
  pairs_.resize(1 << 16);
  for (uint32_t p = 0; p < pairs_.size(); ++p) pairs_[p] = {0, p >> 8, p & 255};
}

void MergeTrainer::add(std::string_view piece, uint64_t count) {
  static const auto id_of_byte = [] {
    std::array<uint32_t, 256> ids;
    for (uint32_t id = 0; id < 256; ++id) ids[gpt2_byte_order()[id]] = id;
    return ids;
  }();
  ++pieces_;
  if (piece.size() < 2) return;
  if (words_.size() + kHead + piece.size() > most_) {
    throw ResourceError("the corpus has more than " + std::to_string(pieces_) +
                        " distinct pieces, too many to merge in this machine's memory: train on a "
                        "part of it");
  }
  words_.push_back(static_cast<uint32_t>(count));
  words_.push_back(static_cast<uint32_t>(count >> 32));
  words_.push_back(static_cast<uint32_t>(piece.size() - 1));
  uint32_t left = id_of_byte[static_cast<uint8_t>(piece[0])];
  for (size_t i = 1; i < piece.size(); ++i) {
    const uint32_t right = id_of_byte[static_cast<uint8_t>(piece[i])];
    words_.push_back(left << 8 | right);
    pairs_[words_.back()].count += static_cast<int64_t>(count);
    left = right;
  }
}

// Lists the words of the pairs from index `from` on, if they can still be merged: counts only fall.
// each(visit) calls visit(pair, word) for all their occurrences, word by word.
template <class EachOccurrence>
void MergeTrainer::list_words(size_t from, int64_t minimum, const EachOccurrence& each) {
  const auto distinct = [&](const auto& visit) {
    last_.assign(pairs_.size() - from, kNone);
    each([&](uint32_t pair, uint32_t word) {
      if (last_[pair - from] == word || pairs_[pair].count < minimum) return;
      last_[pair - from] = word;
      visit(pair, word);
    });
  };
  // Count, sum up so that each pair knows its end, and fill from the ends.
  first_.resize(pairs_.size() + 1);
  distinct([&](uint32_t pair, uint32_t) { ++first_[pair]; });
  for (size_t p = from; p < pairs_.size(); ++p) first_[p + 1] += first_[p];
  lists_.resize(first_.back());
  distinct([&](uint32_t pair, uint32_t word) { lists_[--first_[pair]] = word; });
}

std::vector<std::pair<uint32_t, uint32_t>> MergeTrainer::train(
    size_t merges, uint64_t min_frequency, const std::function<void(size_t)>& progress) {
  const auto minimum = static_cast<int64_t>(std::max<uint64_t>(min_frequency, 1));
  list_words(0, minimum, [&](const auto& visit) {
    for (size_t w = 0; w < words_.size(); w += kHead + words_[w + 2]) {
      for (size_t i = 0; i < words_[w + 2]; ++i) {
        visit(words_[w + kHead + i], static_cast<uint32_t>(w));
      }
    }
  });
  std::priority_queue<Candidate> queue;
  const auto enqueue = [&](uint32_t p) {
    const Pair& pair = pairs_[p];
    if (pair.count >= minimum) queue.push({pair.count, pair.left, pair.right, p});
  };
  for (uint32_t p = 0; p < pairs_.size(); ++p) enqueue(p);

  std::vector<std::pair<uint32_t, uint32_t>> result;
  // By the other token, the pairs that have the token just made on their right, or on their left.
  std::vector<uint32_t> made_right(256 + merges, kNone), made_left(256 + merges, kNone);
  const auto count_new = [&](std::vector<uint32_t>& index, uint32_t other, Pair pair) {
    if (index[other] == kNone) {
      index[other] = static_cast<uint32_t>(pairs_.size());
      pairs_.push_back({0, pair.left, pair.right});
    }
    pairs_[index[other]].count += pair.count;
    return index[other];
  };
  struct Occurrence {
    uint32_t pair, word;
  };
  std::vector<Occurrence> occurrences;
  uint64_t work = 0, reported = 0;  // words looked at; about 10 ms of them between two reports
  while (result.size() < merges && !queue.empty()) {
    const Candidate top = queue.top();
    queue.pop();
    if (top.count != pairs_[top.pair].count) {  // counts only fall after a pair was made
      enqueue(top.pair);
      continue;
    }
    const auto made = static_cast<uint32_t>(256 + result.size());
    result.emplace_back(top.left, top.right);
    const size_t known = pairs_.size();
    occurrences.clear();
    const uint64_t last = first_[top.pair + 1];
    work += 1024 + last - first_[top.pair];
    for (uint64_t at = first_[top.pair]; at < last; ++at) {
      if (at + 8 < last) __builtin_prefetch(&words_[lists_[at + 8]]);
      const uint32_t w = lists_[at];
      int64_t count;
      std::memcpy(&count, &words_[w], sizeof count);
      const uint32_t size = words_[w + 2];
      uint32_t* const pairs = &words_[w + kHead];
      uint32_t kept = 0;
      for (uint32_t i = 0; i < size; ++i) {
        if (pairs[i] != top.pair) {
          pairs[kept++] = pairs[i];
          continue;
        }
        if (kept) {  // x left right: (x, left) becomes (x, made)
          Pair& before = pairs_[pairs[kept - 1]];
          before.count -= count;
          pairs[kept - 1] = count_new(made_right, before.left, {count, before.left, made});
          occurrences.push_back({pairs[kept - 1], w});
        }
        if (++i < size) {  // left right y: (right, y) becomes (made, y)
          Pair& after = pairs_[pairs[i]];
          after.count -= count;
          pairs[kept++] = count_new(made_left, after.right, {count, made, after.right});
          occurrences.push_back({pairs[kept - 1], w});
        }
      }
      words_[w + 2] = kept;
    }
    list_words(known, minimum, [&](const auto& visit) {
      for (const Occurrence& o : occurrences) visit(o.pair, o.word);
    });
    for (auto p = static_cast<uint32_t>(known); p < pairs_.size(); ++p) {
      (pairs_[p].right == made ? made_right[pairs_[p].left] : made_left[pairs_[p].right]) = kNone;
      enqueue(p);
    }
    if (work - reported > 1 << 18) {
      progress(result.size());
      reported = work;
    }
  }
  progress(result.size());
  return result;
}

}  // namespace pygpt
