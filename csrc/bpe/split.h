// Where a text is cut before merging: tiktoken's patterns, written out by hand.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pygpt {

enum class Pattern { kGpt2, kCl100k, kO200k };

// End of the piece that begins at `begin` < `end`, where the text ends at `end`. A piece depends on
// nothing before it. This is the ground truth for the vectorised splitter.
const uint8_t* piece_end(Pattern pattern, const uint8_t* begin, const uint8_t* end);

}  // namespace pygpt
