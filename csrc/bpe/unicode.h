// Character classes of Unicode 16.0 (the version of tiktoken's regular expressions).
#pragma once

#include <cstddef>
#include <cstdint>

namespace pygpt {

enum CharClass : uint8_t {
  kOther = 0,
  kUpper = 1,     // Lu, Lt
  kLower = 2,     // Ll
  kCaseless = 3,  // Lm, Lo
  kMark = 4,
  kNumber = 5,
  kSpace = 6,    // White_Space other than the two below
  kNewline = 7,  // CR, LF
};

// Two stages: class of c = block[index[c >> 7]][c & 127]. Blocks 0 to 7 are uniform.
struct UnicodeTable {
  uint16_t index[0x110000 >> 7];
  uint8_t block[400][128];
  UnicodeTable();
};
extern const UnicodeTable kUnicode;

inline CharClass class_of(uint32_t code) {
  return static_cast<CharClass>(kUnicode.block[kUnicode.index[code >> 7]][code & 127]);
}

struct Char {
  CharClass cls;
  uint8_t size;
};

// The character at p < end. A byte that does not begin a well-formed character is one of class
// kOther and size 1, so that any bytes are safe here.
inline Char char_at(const uint8_t* p, const uint8_t* end) {
  const uint32_t a = p[0];
  if (a < 0x80) return {class_of(a), 1};
  const ptrdiff_t left = end - p;
  const auto continues = [&](ptrdiff_t i) { return i < left && (p[i] & 0xC0) == 0x80; };
  if (a >= 0xC2 && a < 0xE0 && continues(1)) {
    return {class_of((a & 0x1F) << 6 | (p[1] & 0x3F)), 2};
  }
  if (a >= 0xE0 && a < 0xF0 && continues(1) && continues(2)) {
    const uint32_t code = (a & 0x0F) << 12 | (p[1] & 0x3F) << 6 | (p[2] & 0x3F);
    if (code >= 0x800) return {class_of(code), 3};
  }
  if (a >= 0xF0 && a < 0xF5 && continues(1) && continues(2) && continues(3)) {
    const uint32_t code =
        (a & 0x07) << 18 | (p[1] & 0x3F) << 12 | (p[2] & 0x3F) << 6 | (p[3] & 0x3F);
    if (code >= 0x10000 && code < 0x110000) return {class_of(code), 4};
  }
  return {kOther, 1};
}

// Offset of the first byte that is not part of well-formed UTF-8, or `size`.
size_t valid_utf8_prefix(const uint8_t* text, size_t size);

}  // namespace pygpt
