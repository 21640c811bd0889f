// Any corpus: training ends, and its vocabulary encodes the corpus and gives it back.
#include "bpe/train.h"
#include "tokenizer.h"

using namespace pygpt;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size < 2) return 0;
  const auto pattern = static_cast<Pattern>(data[0] % 3);
  const size_t wanted = data[1];
  const std::string_view text = text_of(data + 2, size - 2);
  PieceCounts pieces;
  pieces.add_text(pattern, text);
  MergeTrainer trainer;
  pieces.each([&](std::string_view piece, uint64_t count) { trainer.add(piece, count); });
  const auto merges = trainer.train(wanted, 1 + data[0] / 3 % 3, [](size_t) {});
  CHECK(merges.size() <= wanted);
  std::vector<Token> tokens;
  for (uint32_t id = 0; id < 256; ++id) {
    tokens.push_back({std::string(1, static_cast<char>(gpt2_byte_order()[id])), id});
  }
  for (const auto& [left, right] : merges) {
    CHECK(left < tokens.size() && right < tokens.size());
    const auto id = static_cast<uint32_t>(tokens.size());
    tokens.push_back({tokens[left].bytes + tokens[right].bytes, id});
  }
  const Bpe bpe(Vocabulary(tokens), pattern, Specials());
  CHECK(bpe.vocabulary().merges() == merges);
  Ids ids;
  bpe.encode_ordinary(text, &ids);
  std::string again;
  bpe.decode(ids.data(), ids.size(), &again);
  CHECK(again == text);
  return 0;
}
