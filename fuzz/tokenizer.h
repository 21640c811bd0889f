// What the tokenizer's targets share.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <string>
#include <string_view>
#include <vector>

#include "bpe/encode.h"

#define CHECK(condition)                                                   \
  do {                                                                     \
    if (!(condition)) {                                                    \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
      std::abort();                                                        \
    }                                                                      \
  } while (false)

inline std::string_view text_of(const uint8_t* data, size_t size) {
  return {reinterpret_cast<const char*>(data), size};
}

// The bytes, and tokens whose ranks are in no useful order.
inline pygpt::Vocabulary small_vocabulary() {
  std::vector<pygpt::Token> tokens;
  for (uint32_t b = 0; b < 256; ++b) tokens.push_back({std::string(1, static_cast<char>(b)), b});
  uint32_t id = 1000;
  for (const char* bytes :
       {"ab",   "bc",   "abc",      " a",
        " th",  "th",   "the",      " the",
        "  ",   "    ", "aa",       "aaaa",
        "\r\n", "\n\n", "\xe6\xbc", "\xe6\xbc\xa2",
        "'s",   "'ll",  "<|x|>",    "a very long token that has no merges of its own"}) {
    tokens.push_back({bytes, id--});
  }
  return pygpt::Vocabulary(tokens);
}
