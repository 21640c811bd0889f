// Any bytes: the vectorised splitter finds the scalar one's pieces, and decoding gives the text
// back.
#include <algorithm>

#include "bpe/scan.h"
#include "tokenizer.h"

using namespace pygpt;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const auto bpes = [] {
    Specials specials;
    specials.add("<|x|>", 2000);
    specials.add("<|", 2001);
    std::vector<std::unique_ptr<Bpe>> all;
    for (const Pattern pattern : {Pattern::kGpt2, Pattern::kCl100k, Pattern::kO200k}) {
      Vocabulary vocabulary = small_vocabulary();
      vocabulary.add_special("<|x|>", 2000);
      vocabulary.add_special("<|", 2001);
      all.push_back(std::make_unique<Bpe>(std::move(vocabulary), pattern, specials));
    }
    return all;
  }();
  for (const auto& bpe : bpes) {
    const uint8_t* expected = data;
    for (PieceScanner pieces(*bpe->pattern(), data, size); pieces.next();) {
      for (size_t i = 0; i < pieces.pieces(); ++i) {
        const uint8_t* const end = piece_end(*bpe->pattern(), expected, data + size);
        CHECK(pieces.starts()[i + 1] - pieces.starts()[i] == static_cast<size_t>(end - expected));
        expected = end;
      }
    }
    CHECK(expected == data + size);
    Ids ids;
    const size_t count = bpe->encode(text_of(data, size), bpe->specials(), Specials(), &ids);
    CHECK(count == ids.size());
    CHECK(bpe->encode(text_of(data, size), bpe->specials(), Specials(), nullptr) == count);
    std::string again;
    bpe->decode(ids.data(), ids.size(), &again);
    CHECK(again == text_of(data, size));
    const size_t cut = last_safe_cut(text_of(data, size));
    Ids parts, whole;
    bpe->encode_ordinary(text_of(data, cut), &parts);
    bpe->encode_ordinary(text_of(data + cut, size - cut), &parts);
    bpe->encode_ordinary(text_of(data, size), &whole);
    CHECK(std::equal(parts.data(), parts.data() + parts.size(), whole.data(),
                     whole.data() + whole.size()));
  }
  return 0;
}
