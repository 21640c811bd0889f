#include "bpe/scan.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "bpe/unicode.h"
#include "core/isa.h"

namespace pygpt {
namespace {

// Calls visit(position) for every bit of a mask's word, in ascending order.
template <class Visit>
inline void each_bit(uint64_t bits, size_t word, const Visit& visit) {
  for (; bits; bits &= bits - 1) visit(64 * word + std::countr_zero(bits));
}

}  // namespace

PieceScanner::PieceScanner(Pattern pattern, const uint8_t* text, size_t size)
    : pattern_(pattern), text_(text), end_(text + size) {}

// A chunk begins at a piece, and a piece depends on nothing before it: no state is carried over.
// Only white space looks ahead, so that a chunk may end at any piece that follows something else;
// its last block is only looked at.
bool PieceScanner::next() {
  if (text_ == end_) return false;
  const size_t left = end_ - text_;
  const bool at_end = left <= kChunk - 64;
  if (left <= kChunk + kPadding && !copied_) {  // so that whole blocks and keys can be read
    std::memcpy(tail_, text_, left);
    std::memset(tail_ + left, 0, 2 * kPadding);
    text_ = tail_;
    end_ = tail_ + left;
    copied_ = true;
  }
  base_ = text_;
  const size_t size = at_end ? left : kChunk;
  size_t used = 0;
  switch (pattern_) {
    case Pattern::kGpt2:
      used = scan<Pattern::kGpt2>(size, at_end);
      break;
    case Pattern::kCl100k:
      used = scan<Pattern::kCl100k>(size, at_end);
      break;
    case Pattern::kO200k:
      used = scan<Pattern::kO200k>(size, at_end);
      break;
  }
  if (used) {
    list_starts(used);
  } else {
    list_slowly();
  }
  text_ += starts_[pieces_];
  return true;
}

// Finds the pieces of the chunk; returns where they end, 0 if that is not known.
template <Pattern pattern>
size_t PieceScanner::scan(size_t size, bool at_end) {
  classify<pattern>(size);
  const size_t words = at_end ? (size + 63) / 64 : kBlocks - 1;
  if constexpr (pattern == Pattern::kGpt2) {
    find_gpt2_starts(words);
  } else {
    find_starts<pattern>(words);
  }
  start_[words] = start_[words + 1] = 0;
  find_contractions<pattern>(words);
  if (at_end) join_last_blanks(size);
  if (any_odd_) repair(at_end ? size : 64 * words);
  return at_end ? size : last_safe_start(words);
}

template <Pattern pattern>
void PieceScanner::classify(size_t size) {
  const size_t blocks = (size + 63) / 64;
  cpu_kernels().byte_classes(base_, static_cast<int64_t>(blocks), classes_);
  classes_[blocks] = {};
  uint64_t any_high = 0;
  for (size_t i = 0; i <= blocks; ++i) {
    const ByteClasses& c = classes_[i];
    letter_[i] = c.upper | c.lower;
    if constexpr (pattern == Pattern::kO200k) {
      upper_[i] = c.upper;
      lower_[i] = c.lower;
      caseless_[i] = 0;
    }
    numeral_[i] = c.digit;
    blank_[i] = c.blank;
    newline_[i] = c.newline;
    space_[i] = c.space;
    apostrophe_[i] = c.apostrophe;
    any_high |= c.high;
  }
  any_odd_ = false;
  std::memset(continuation_, 0, (blocks + 1) * sizeof(uint64_t));
  std::memset(odd_, 0, (blocks + 1) * sizeof(uint64_t));
  if (any_high) classify_unicode(blocks);
  for (size_t i = 0; i < blocks; ++i) symbol_[i] = ~(letter_[i] | numeral_[i] | blank_[i]);
  if (size & 63) symbol_[blocks - 1] &= (uint64_t{1} << (size & 63)) - 1;
}

// The character at p, where four bytes can be read; the usual sizes first.
inline Char next_char(const uint8_t* p, const uint8_t* end) {
  uint32_t bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  if ((bytes & 0xC0C0F0) == 0x8080E0) {
    const uint32_t code = (bytes & 0x0F) << 12 | (bytes >> 2 & 0xFC0) | (bytes >> 16 & 0x3F);
    if (code >= 0x800 && end - p >= 3) return {class_of(code), 3};
  } else if ((bytes & 0xC0E0) == 0x80C0) {
    const uint32_t code = (bytes & 0x1F) << 6 | (bytes >> 8 & 0x3F);
    if (code >= 0x80 && end - p >= 2) return {class_of(code), 2};
  }
  return char_at(p, end);
}

void PieceScanner::classify_unicode(size_t blocks) {
  const bool cased = pattern_ == Pattern::kO200k;
  Char last{kOther, 0};  // what began in the block before, and its bytes in this one
  uint64_t begun = 0;
  for (size_t i = 0; i < blocks; ++i) {
    const uint64_t high = classes_[i].high, trailing = classes_[i].trailing;
    uint64_t here[8], last_bytes, last_shift;
    // In well-formed text a character begins at every high byte that does not look like a later
    // one: nothing has to wait for the sizes of those before it. If that was not so, once more.
    for (const bool well_formed : {true, false}) {
      std::memset(here, 0, sizeof here);
      here[last.cls] = begun;
      uint64_t later = begun;
      Char c = last;
      last_bytes = last_shift = 0;
      for (uint64_t left = high & ~(well_formed ? trailing : begun); left;) {
        const int shift = std::countr_zero(left);
        c = next_char(base_ + 64 * i + shift, end_);
        const uint64_t bytes = (uint64_t{1} << c.size) - 1;
        here[c.cls] |= bytes << shift;  // data, not a branch: classes cannot be foretold
        later |= (bytes - 1) << shift;
        last_bytes = bytes;
        last_shift = shift;
        left &= well_formed ? left - 1 : ~(bytes << shift);
      }
      continuation_[i] = later;
      if (later == trailing || !well_formed) {
        last = c;
        break;
      }
    }
    begun = last_bytes >> 1 >> (63 - last_shift);
    const uint64_t firsts = ~continuation_[i];
    letter_[i] |= here[kUpper] | here[kLower] | here[kCaseless];
    numeral_[i] |= here[kNumber];
    blank_[i] |= here[kSpace] | here[kNewline];
    odd_[i] = (here[kSpace] | here[kNewline]) & firsts;
    if (pattern_ != Pattern::kGpt2) odd_[i] |= here[kNumber] & firsts;
    if (cased) {
      upper_[i] |= here[kUpper];
      lower_[i] |= here[kLower];
      caseless_[i] |= here[kCaseless];
      each_bit(here[kMark], i, [&](size_t p) {  // marks go with the letters before them
        if (p && test(letter_, p - 1)) {
          set(letter_, p);
          set(caseless_, p);
        } else if (!test(continuation_, p)) {
          set(odd_, p);
        }
      });
    }
    any_odd_ |= odd_[i] != 0;
  }
  // What began in the last block and ends after it; nothing but its class is asked for there.
  continuation_[blocks] = begun;
  if (last.cls == kUpper || last.cls == kLower || last.cls == kCaseless) letter_[blocks] |= begun;
  if (last.cls == kNumber) numeral_[blocks] |= begun;
  if (last.cls == kSpace || last.cls == kNewline) blank_[blocks] |= begun;
}

void PieceScanner::find_gpt2_starts(size_t words) {
  for (size_t i = 0; i < words; ++i) {
    const uint64_t runs = (letter_[i] & ~before(letter_, i)) |
                          (numeral_[i] & ~before(numeral_, i)) | (symbol_[i] & ~before(symbol_, i));
    // A run of blanks leaves its last to what follows; a space goes with it.
    start_[i] = (runs & ~before(space_, i)) | (blank_[i] & ~(before(blank_, i) & after(blank_, i)));
  }
}

template <Pattern pattern>
void PieceScanner::find_starts(size_t words) {
  uint64_t carry = 0, ends_before = 0, absorbed_before = 0;
  for (size_t i = 0; i < words; ++i) {
    const uint64_t symbol = symbol_[i], newline = newline_[i], letter = letter_[i];
    // Symbols take the newlines that follow them: adding a run's first bit carries through it.
    uint64_t sum;
    const bool over = __builtin_add_overflow(newline, newline & before(symbol_, i), &sum);
    carry = __builtin_add_overflow(sum, carry, &sum) | over;
    const uint64_t absorbed = newline & ~sum;
    rest_[i] = blank_[i] & ~absorbed;
    const uint64_t plain = rest_[i] & ~newline;  // blanks other than CR and LF
    const uint64_t before_newline = before(newline_, i) & before(rest_, i);
    const uint64_t before_plain = before(rest_, i) & ~before(newline_, i);

    const uint64_t symbols = symbol & ~before(symbol_, i) & ~before(space_, i);
    // A word takes one character before it that is no CR, LF, letter or numeral and begins a piece:
    // the last of a run of blanks, or a symbol that stands alone.
    uint64_t ends = symbols;
    for (int k = 0; k < 3; ++k) ends |= (ends << 1 | ends_before >> 63) & continuation_[i];
    const uint64_t words_alone =
        letter & ~before(letter_, i) & ~(ends << 1 | ends_before >> 63) & ~before_plain;
    ends_before = ends;

    start_[i] = symbols | words_alone | (numeral_[i] & ~before(numeral_, i)) |
                (rest_[i] & ~before(rest_, i)) | (plain & before_newline) |
                (plain & ~after(blank_, i));
    if constexpr (pattern == Pattern::kO200k) {
      start_[i] |= upper_[i] & before(lower_, i);
      const uint64_t after_both = upper_[i] & before(caseless_, i);
      odd_[i] |= after_both;
      any_odd_ |= after_both != 0;
      each_bit(symbol & (absorbed << 1 | absorbed_before >> 63), i, [&](size_t p) {
        if (base_[p] != '/') return;  // a slash goes with the newlines before it
        set(odd_, p);
        any_odd_ = true;
      });
      absorbed_before = absorbed;
    }
    // A run of blanks is cut after its last newline only.
    each_bit(rest_[i] & newline & before_plain, i, [&](size_t p) {
      do --p;
      while (p && test(rest_, p - 1) && !test(newline_, p - 1));
      if (p && test(rest_, p - 1)) clear(start_, p);
    });
    const uint64_t numeral_before = i ? numeral_[i - 1] : 0;
    uint64_t fourth = numeral_[i];
    for (int k = 1; k <= 3; ++k) fourth &= numeral_[i] << k | numeral_before >> (64 - k);
    each_bit(fourth, i, [&](size_t p) {
      if (test(start_, p - 3)) set(start_, p);
    });
  }
}

template <Pattern pattern>
void PieceScanner::find_contractions(size_t words) {
  size_t last_end = 0;
  for (size_t i = 0; i < words; ++i) {
    // In o200k they end a word, elsewhere they are pieces.
    constexpr bool suffix = pattern == Pattern::kO200k;
    each_bit(apostrophe_[i] & (suffix ? before(letter_, i) : start_[i]), i, [&](size_t p) {
      if (suffix && p == last_end) return;
      const uint8_t* const q = contraction_end(base_ + p, end_, pattern != Pattern::kGpt2);
      last_end = q - base_;
      for (size_t inner = suffix ? p : p + 1; inner < last_end; ++inner) clear(start_, inner);
      if (last_end > p) set(start_, last_end);
    });
  }
}

// At the end of the text nothing follows that the last blank could go with.
void PieceScanner::join_last_blanks(size_t size) {
  size_t p = size;
  const auto joins = [&](size_t q) {
    if (pattern_ == Pattern::kGpt2) return test(blank_, q);
    return test(rest_, q) && (pattern_ == Pattern::kCl100k || !test(newline_, q));
  };
  while (p && joins(p - 1)) --p;
  while (++p < size) clear(start_, p);
}

// Goes piece by piece from before each odd place until past it.
void PieceScanner::repair(size_t limit) {
  size_t done = 0;
  for (size_t i = 0; 64 * i < limit; ++i) {
    each_bit(odd_[i], i, [&](size_t odd) {
      if (odd < done || odd >= limit) return;
      size_t p = odd ? odd - 1 : 0;
      const auto settled = [&](size_t q) {  // a piece begins here whatever follows
        return test(start_, q) && (!test(blank_, q) || (base_[q] == ' ' && !test(blank_, q + 1)));
      };
      while (p && !settled(p)) --p;
      for (;;) {
        const size_t e = piece_end(pattern_, base_ + p, end_) - base_;
        for (size_t q = p + 1; q < std::min(e, limit); ++q) clear(start_, q);
        done = e;
        if (e >= limit) return;
        const bool agreed = test(start_, e);
        set(start_, e);
        if (agreed && e > odd) return;
        p = e;
      }
    });
  }
}

size_t PieceScanner::last_safe_start(size_t words) const {
  for (size_t i = words; i-- > 0;) {
    const uint64_t safe = start_[i] & ~before(blank_, i);
    if (safe) return 64 * i + 63 - std::countl_zero(safe);
  }
  return 0;
}

void PieceScanner::list_starts(size_t size) {
  uint32_t* out = starts_;
  for (size_t i = 0; 64 * i < size; ++i) {
    uint64_t bits = start_[i];
    if (size - 64 * i < 64) bits &= (uint64_t{1} << (size & 63)) - 1;
    const int count = std::popcount(bits);
    // Eight at a time without looking whether there are so many: few branches to foretell.
    for (int k = 0; k < count; k += 8) {
      for (int j = 0; j < 8; ++j) {
        out[k + j] = static_cast<uint32_t>(64 * i + std::countr_zero(bits | uint64_t{1} << 63));
        bits &= bits - 1;
      }
    }
    out += count;
  }
  pieces_ = out - starts_;
  *out = static_cast<uint32_t>(size);
}

void PieceScanner::list_slowly() {
  const uint8_t* p = text_;
  pieces_ = 0;
  do {
    starts_[pieces_++] = static_cast<uint32_t>(p - base_);
    p = piece_end(pattern_, p, end_);
  } while (p - base_ < static_cast<ptrdiff_t>(kChunk - 64) && end_ - p >= 16);
  starts_[pieces_] = static_cast<uint32_t>(p - base_);
}

}  // namespace pygpt
