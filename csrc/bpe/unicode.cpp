#include "bpe/unicode.h"

#include <cstring>
#include <iterator>

namespace pygpt {
namespace {

constexpr uint32_t kRanges[] = {
#include "bpe/unicode_table.inc"
};

}  // namespace

UnicodeTable::UnicodeTable() {
  for (int cls = 0; cls < 8; ++cls) std::memset(block[cls], cls, sizeof block[cls]);
  size_t range = 0;
  uint16_t next_block = 8;
  for (uint32_t i = 0; i < std::size(index); ++i) {
    const uint32_t first = i << 7;
    const auto range_end = [&] {
      return range + 1 < std::size(kRanges) ? kRanges[range + 1] >> 3 : 0x110000;
    };
    while (range_end() <= first) ++range;
    if (range_end() >= first + 128) {
      index[i] = static_cast<uint16_t>(kRanges[range] & 7);
      continue;
    }
    index[i] = next_block;
    for (uint32_t j = 0; j < 128; ++j) {
      while (range_end() <= first + j) ++range;
      block[next_block][j] = static_cast<uint8_t>(kRanges[range] & 7);
    }
    ++next_block;
  }
}

const UnicodeTable kUnicode;

size_t valid_utf8_prefix(const uint8_t* text, size_t size) {
  const uint8_t *p = text, *end = text + size;
  while (p < end) {
    if (*p < 0x80) {
      uint64_t word;
      while (end - p >= 8 && (std::memcpy(&word, p, 8), !(word & 0x8080808080808080))) p += 8;
      while (p < end && *p < 0x80) ++p;
      continue;
    }
    const Char c = char_at(p, end);
    const bool surrogate = p[0] == 0xED && c.size == 3 && p[1] >= 0xA0;
    if (c.size == 1 || surrogate) break;
    p += c.size;
  }
  return p - text;
}

}  // namespace pygpt
