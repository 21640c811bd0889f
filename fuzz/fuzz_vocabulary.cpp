// Any file given to the readers: a vocabulary that can encode, or std::invalid_argument.
#include "tokenizer.h"

using namespace pygpt;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  for (auto* const read : {&parse_tiktoken, &parse_gpt2_merges}) {
    try {
      std::vector<Token> tokens = read(text_of(data, size));
      for (Token& token : tokens) token.id %= 1 << 16;  // no large tables here
      const Bpe bpe(Vocabulary(std::move(tokens)), Pattern::kO200k, Specials());
      Ids ids;
      bpe.encode_ordinary(text_of(data, size), &ids);
      std::string again;
      bpe.decode(ids.data(), ids.size(), &again);
      CHECK(again == text_of(data, size));
    } catch (const std::invalid_argument&) {
    }
  }
  return 0;
}
