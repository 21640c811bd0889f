// The splitter that works on 64 bytes at a time; it finds the same pieces as piece_end().
#pragma once

#include <cstddef>
#include <cstdint>

#include "bpe/split.h"
#include "cpu/kernels.h"

namespace pygpt {

// Walks through a text in batches of pieces.
class PieceScanner {
 public:
  static constexpr size_t kPadding = 64;

  PieceScanner(Pattern pattern, const uint8_t* text, size_t size);

  // The next pieces: piece i is base()[starts()[i] .. starts()[i + 1]), of pieces() of them; there
  // are 16 readable bytes after the first byte of each. False at the end of the text.
  bool next();
  const uint8_t* base() const { return base_; }
  const uint32_t* starts() const { return starts_; }
  size_t pieces() const { return pieces_; }

 private:
  static constexpr size_t kBlocks = 64;
  static constexpr size_t kChunk = kBlocks * 64;

  template <Pattern pattern>
  size_t scan(size_t size, bool at_end);
  template <Pattern pattern>
  void classify(size_t size);
  void classify_unicode(size_t blocks);
  void find_gpt2_starts(size_t words);
  template <Pattern pattern>
  void find_starts(size_t words);
  template <Pattern pattern>
  void find_contractions(size_t words);
  void join_last_blanks(size_t size);
  void repair(size_t limit);
  size_t last_safe_start(size_t words) const;
  void list_starts(size_t size);
  void list_slowly();

  static uint64_t before(const uint64_t* mask, size_t i) {  // bit p: bit p - 1 of mask
    return mask[i] << 1 | (i ? mask[i - 1] >> 63 : 0);
  }
  static uint64_t after(const uint64_t* mask, size_t i) {  // bit p: bit p + 1 of mask
    return mask[i] >> 1 | mask[i + 1] << 63;
  }
  static bool test(const uint64_t* mask, size_t p) { return mask[p >> 6] >> (p & 63) & 1; }
  static void set(uint64_t* mask, size_t p) { mask[p >> 6] |= uint64_t{1} << (p & 63); }
  static void clear(uint64_t* mask, size_t p) { mask[p >> 6] &= ~(uint64_t{1} << (p & 63)); }

  Pattern pattern_;
  const uint8_t *text_, *end_;
  const uint8_t* base_ = nullptr;
  size_t pieces_ = 0;
  bool copied_ = false;  // the rest of the text stands in tail_

  // Masks of one chunk, a bit a byte; every byte of a character has its class.
  using Mask = uint64_t[kBlocks + 2];
  Mask letter_, numeral_, blank_, newline_, space_, symbol_, apostrophe_;
  Mask upper_, lower_, caseless_;  // of letters, for o200k
  Mask rest_;                      // blanks that no symbols took with them
  Mask continuation_;              // bytes of a character after its first
  Mask odd_;                       // where masks do not suffice
  Mask start_;                     // of pieces
  bool any_odd_ = false;
  ByteClasses classes_[kBlocks + 1];
  uint32_t starts_[kChunk + 16];
  uint8_t tail_[kChunk + 3 * kPadding];
};

}  // namespace pygpt
