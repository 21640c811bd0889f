// Any file given to the readers, and any list of merges, which is what the reader of tokenizer.json
// hands over: a vocabulary that can encode, or std::invalid_argument.
#include <algorithm>

#include "tokenizer.h"

using namespace pygpt;

static void encode_and_decode(Vocabulary vocabulary, std::string_view text) {
  const Bpe bpe(std::move(vocabulary), Pattern::kO200k, Specials());
  Ids ids;
  bpe.encode_ordinary(text, &ids);
  std::string again;
  bpe.decode(ids.data(), ids.size(), &again);
  CHECK(again == text);
}

// A byte makes a pair of the tokens so far; with a bit of the first byte, tokens and merges clash.
static void merge_list(const uint8_t* data, size_t size) {
  std::vector<Token> tokens;
  for (uint32_t b = 0; b < 256; ++b) tokens.push_back({std::string(1, static_cast<char>(b)), b});
  std::vector<std::pair<uint32_t, uint32_t>> merges;
  for (size_t i = 1; i + 1 < size && i < 200; i += 2) {
    const auto count = static_cast<uint32_t>(tokens.size());
    const uint32_t left = data[i] & 1 ? data[i] : count - 1 - data[i] % 64;
    const uint32_t right = data[i + 1] & 1 ? data[i + 1] : count - 1 - data[i + 1] % 64;
    const std::string bytes = tokens[left].bytes + tokens[right].bytes;
    if (bytes.size() > 200) break;
    merges.emplace_back(left, right);
    const bool known = std::any_of(tokens.begin(), tokens.end(),
                                   [&](const Token& token) { return token.bytes == bytes; });
    if (!known || data[0] & 2) tokens.push_back({bytes, count});
  }
  encode_and_decode(Vocabulary(tokens, merges, data[0] & 1), text_of(data, size));
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  for (auto* const read : {&parse_tiktoken, &parse_gpt2_merges}) {
    try {
      std::vector<Token> tokens = read(text_of(data, size));
      for (Token& token : tokens) token.id %= 1 << 16;  // no large tables here
      encode_and_decode(Vocabulary(std::move(tokens)), text_of(data, size));
    } catch (const std::invalid_argument&) {
    }
  }
  try {
    if (size) merge_list(data, size);
  } catch (const std::invalid_argument&) {
  }
  return 0;
}
