// Any ids: their bytes, or KeyError.
#include <cstring>

#include "core/error.h"
#include "tokenizer.h"

using namespace pygpt;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const Bpe bpe(small_vocabulary(), Pattern::kGpt2, Specials());
  std::vector<uint32_t> ids;
  std::string expected, out;
  bool known = true;
  for (size_t i = 0; i + 1 < size; i += 2) {
    ids.push_back(static_cast<uint32_t>(data[i] | (data[i + 1] & 7) << 8));
    known = known && bpe.vocabulary().has(ids.back());
    if (known) expected += bpe.vocabulary().bytes(ids.back());
  }
  if (size % 2) ids.push_back(~uint32_t{0}), known = false;
  try {
    bpe.decode(ids.data(), ids.size(), &out);
    CHECK(known && out == expected);
  } catch (const KeyError&) {
    CHECK(!known);
  }
  return 0;
}
