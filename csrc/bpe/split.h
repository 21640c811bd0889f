// Where a text is cut before merging: tiktoken's patterns, written out by hand.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

#include "bpe/unicode.h"

namespace pygpt {

enum class Pattern { kGpt2, kCl100k, kO200k };

// End of the piece that begins at `begin` < `end`, where the text ends at `end`. A piece depends on
// nothing before it. The ground truth for PieceScanner (scan.h).
const uint8_t* piece_end(Pattern pattern, const uint8_t* begin, const uint8_t* end);

// End of 's 't 're 've 'm 'll 'd at p < end, or p. Case folding adds one character to the ASCII
// ones: U+017F is an s.
const uint8_t* contraction_end(const uint8_t* p, const uint8_t* end, bool any_case);

// Whether a text may be cut after characters of the classes a and b, before one of c, with the same
// pieces whatever the pattern: where a blank follows a letter, or a letter a newline that stands
// alone.
bool may_cut(CharClass a, CharClass b, CharClass c);

// Largest position in text at which it may be cut; 0 when there is none.
size_t last_safe_cut(std::string_view text);

}  // namespace pygpt
