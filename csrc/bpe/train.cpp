#include "bpe/train.h"

#include <algorithm>
#include <array>
#include <bit>
#include <queue>

#include "bpe/scan.h"

namespace pygpt {

void PieceCounts::add_text(Pattern pattern, std::string_view text) {
  const auto* begin = reinterpret_cast<const uint8_t*>(text.data());
  constexpr size_t kGroup = 32;  // keys made, and their places fetched, ahead of counting
  ShortKey keys[kGroup];
  for (PieceScanner pieces(pattern, begin, text.size()); pieces.next();) {
    for (size_t from = 0; from < pieces.pieces(); from += kGroup) {
      const uint32_t* const starts = pieces.starts() + from;
      const size_t count = std::min(kGroup, pieces.pieces() - from);
      for (size_t i = 0; i < count; ++i) {
        keys[i] = key_at(pieces.base() + starts[i], starts[i + 1] - starts[i]);
        if (used_) __builtin_prefetch(&slots_[hash_of(keys[i]) >> shift_]);
      }
      for (size_t i = 0; i < count; ++i) {
        const size_t size = starts[i + 1] - starts[i];
        if (size <= kShortKey) {
          add_short(keys[i], 1);
        } else {
          add_piece({reinterpret_cast<const char*>(pieces.base()) + starts[i], size}, 1);
        }
      }
    }
  }
}

void PieceCounts::add_piece(std::string_view piece, uint64_t count) {
  if (piece.empty() || count == 0) return;
  if (piece.size() > kShortKey) {
    long_[std::string(piece)] += count;
  } else {
    add_short(short_key(reinterpret_cast<const uint8_t*>(piece.data()), piece.size()), count);
  }
}

void PieceCounts::add_all(const PieceCounts& other) {
  for (const Slot& slot : other.slots_) {
    if (slot.count) add_short(slot.key, slot.count);
  }
  for (const auto& [piece, count] : other.long_) long_[piece] += count;
}

void PieceCounts::add_short(ShortKey key, uint64_t count) {
  if (used_ * 2 >= slots_.size()) grow();
  size_t i = hash_of(key) >> shift_;
  while (slots_[i].count && slots_[i].key != key) i = (i + 1) & (slots_.size() - 1);
  used_ += slots_[i].count == 0;
  slots_[i].key = key;
  slots_[i].count += count;
}

void PieceCounts::grow() {
  std::vector<Slot> old(std::max<size_t>(1 << 12, slots_.size() * 4));
  old.swap(slots_);
  shift_ = 64 - std::countr_zero(slots_.size());
  for (const Slot& slot : old) {
    if (!slot.count) continue;
    size_t i = hash_of(slot.key) >> shift_;
    while (slots_[i].count) i = (i + 1) & (slots_.size() - 1);
    slots_[i] = slot;
  }
}

namespace {

struct Pair {
  uint32_t left, right;
  auto operator<=>(const Pair&) const = default;
};

// Every pair that ever occurred: its count now, and the words in which it may still occur.
class Pairs {
 public:
  static constexpr uint32_t kNone = ~0u;

  uint32_t index_of(Pair pair) {
    if (pairs_.size() * 2 >= slots_.size()) grow();
    size_t i = slot(pair);
    while (slots_[i] != kNone) {
      if (pairs_[slots_[i]] == pair) return slots_[i];
      i = (i + 1) & (slots_.size() - 1);
    }
    slots_[i] = static_cast<uint32_t>(pairs_.size());
    pairs_.push_back(pair);
    counts_.push_back(0);
    words_.push_back(kNone);
    return slots_[i];
  }
  Pair pair(uint32_t index) const { return pairs_[index]; }
  int64_t& count(uint32_t index) { return counts_[index]; }
  void occurs_in(uint32_t index, uint32_t word) {
    if (words_[index] != kNone && nodes_[words_[index]].word == word) return;
    nodes_.push_back({word, words_[index]});
    words_[index] = static_cast<uint32_t>(nodes_.size() - 1);
  }
  template <class Visit>
  void each_word(uint32_t index, const Visit& visit) {
    for (uint32_t n = words_[index]; n != kNone; n = nodes_[n].next) visit(nodes_[n].word);
  }
  size_t size() const { return pairs_.size(); }

 private:
  struct Node {
    uint32_t word, next;
  };
  size_t slot(Pair p) const {
    return (uint64_t{p.left} << 32 | p.right) * 0x9E3779B97F4A7C15u >> shift_;
  }
  void grow() {
    slots_.assign(std::max<size_t>(1 << 14, slots_.size() * 2), kNone);
    shift_ = 64 - std::countr_zero(slots_.size());
    for (uint32_t p = 0; p < pairs_.size(); ++p) {
      size_t i = slot(pairs_[p]);
      while (slots_[i] != kNone) i = (i + 1) & (slots_.size() - 1);
      slots_[i] = p;
    }
  }

  std::vector<Pair> pairs_;
  std::vector<int64_t> counts_;
  std::vector<uint32_t> words_;  // first node of each pair's list
  std::vector<Node> nodes_;
  std::vector<uint32_t> slots_;
  int shift_ = 64;
};

struct Word {
  size_t begin;
  uint32_t size;
  int64_t count;
};

struct Candidate {
  int64_t count;
  Pair pair;
  uint32_t index;
  bool operator<(const Candidate& b) const {
    return count != b.count ? count < b.count : pair > b.pair;
  }
};

}  // namespace

std::vector<std::pair<uint32_t, uint32_t>> train_merges(
    const PieceCounts& pieces, size_t merges, uint64_t min_frequency,
    const std::function<void(size_t)>& progress) {
  std::array<uint32_t, 256> id_of_byte;
  for (uint32_t id = 0; id < 256; ++id) id_of_byte[gpt2_byte_order()[id]] = id;

  std::vector<uint32_t> symbols;  // all words, one after the other; merging shortens them in place
  std::vector<Word> words;
  Pairs pairs;
  pieces.each([&](const uint8_t* piece, size_t size, uint64_t count) {
    if (size < 2) return;
    const auto word = static_cast<uint32_t>(words.size());
    words.push_back({symbols.size(), static_cast<uint32_t>(size), static_cast<int64_t>(count)});
    for (size_t i = 0; i < size; ++i) {
      symbols.push_back(id_of_byte[piece[i]]);
      if (i == 0) continue;
      const uint32_t p = pairs.index_of({symbols[symbols.size() - 2], symbols.back()});
      pairs.count(p) += static_cast<int64_t>(count);
      pairs.occurs_in(p, word);
    }
  });

  const auto minimum = static_cast<int64_t>(std::max<uint64_t>(min_frequency, 1));
  std::priority_queue<Candidate> queue;
  const auto enqueue = [&](uint32_t p) {
    if (pairs.count(p) >= minimum) queue.push({pairs.count(p), pairs.pair(p), p});
  };
  for (uint32_t p = 0; p < pairs.size(); ++p) enqueue(p);

  std::vector<std::pair<uint32_t, uint32_t>> result;
  while (result.size() < merges && !queue.empty()) {
    const Candidate top = queue.top();
    queue.pop();
    if (top.count != pairs.count(top.index)) {  // counts only fall after a pair was made
      enqueue(top.index);
      continue;
    }
    const auto made = static_cast<uint32_t>(256 + result.size());
    result.emplace_back(top.pair.left, top.pair.right);
    const size_t known = pairs.size();
    std::vector<uint32_t> containing;
    pairs.each_word(top.index, [&](uint32_t w) { containing.push_back(w); });
    for (const uint32_t w : containing) {
      Word& word = words[w];
      uint32_t* const s = symbols.data() + word.begin;
      uint32_t kept = 0;
      for (uint32_t i = 0; i < word.size; ++i) {
        if (s[i] != top.pair.left || i + 1 == word.size || s[i + 1] != top.pair.right) {
          s[kept++] = s[i];
          continue;
        }
        if (kept > 0) {
          pairs.count(pairs.index_of({s[kept - 1], top.pair.left})) -= word.count;
          const uint32_t p = pairs.index_of({s[kept - 1], made});
          pairs.count(p) += word.count;
          pairs.occurs_in(p, w);
        }
        if (i + 2 < word.size) {
          pairs.count(pairs.index_of({top.pair.right, s[i + 2]})) -= word.count;
          const uint32_t p = pairs.index_of({made, s[i + 2]});
          pairs.count(p) += word.count;
          pairs.occurs_in(p, w);
        }
        s[kept++] = made;
        ++i;
      }
      word.size = kept;
    }
    for (auto p = static_cast<uint32_t>(known); p < pairs.size(); ++p) enqueue(p);
    if (result.size() % 256 == 0) progress(result.size());
  }
  progress(result.size());
  return result;
}

}  // namespace pygpt
