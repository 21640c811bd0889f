// Text of fixed-width code points, as Python keeps it, to UTF-8.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace pygpt {

// Room that to_utf8() needs for `count` code points.
template <class Unit>
constexpr size_t utf8_room(size_t count) {
  return count * (sizeof(Unit) == 4 ? 4 : sizeof(Unit) + 1) + 16;
}

// Writes the UTF-8 of code points at `out`; returns its end, or nullptr where one is a surrogate.
template <class Unit>
char* to_utf8(const Unit* p, size_t count, char* out) {
  const Unit* const end = p + count;
  bool surrogates = false;
  while (p != end) {
    while (end - p >= 16) {  // ASCII, as vectors
      char narrow[16];
      Unit all = 0;
      for (int j = 0; j < 16; ++j) {
        narrow[j] = static_cast<char>(p[j]);
        all |= p[j];
      }
      std::memcpy(out, narrow, sizeof narrow);
      if (all >= 0x80) break;
      p += 16;
      out += 16;
    }
    // One by one without branches, since sizes cannot be foretold: four bytes each, then on by the
    // size.
    for (const Unit* const stop = p + std::min<ptrdiff_t>(16, end - p); p != stop; ++p) {
      const uint32_t c = *p, last = 0x80 | (c & 63), middle = 0x80 | (c >> 6 & 63);
      uint32_t bytes = c < 0x80 ? c : 0xC0 | c >> 6 | last << 8;
      size_t size = c < 0x80 ? 1 : 2;
      if constexpr (sizeof(Unit) > 1) {
        bytes = c < 0x800 ? bytes : 0xE0 | c >> 12 | middle << 8 | last << 16;
        size = c < 0x800 ? size : 3;
        surrogates |= (c & ~0x7FFu) == 0xD800;
      }
      if constexpr (sizeof(Unit) > 2) {
        const uint32_t second = 0x80 | (c >> 12 & 63);
        bytes = c < 0x10000 ? bytes : 0xF0 | c >> 18 | second << 8 | middle << 16 | last << 24;
        size = c < 0x10000 ? size : 4;
      }
      std::memcpy(out, &bytes, sizeof bytes);
      out += size;
    }
  }
  return surrogates ? nullptr : out;
}

}  // namespace pygpt
