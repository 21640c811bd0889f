// Where a text is cut before merging: tiktoken's patterns, written out by hand.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pygpt {

enum class Pattern { kGpt2, kCl100k, kO200k };

// End of the piece that begins at `begin` < `end`, where the text ends at `end`. A piece depends on
// nothing before it. The ground truth for PieceScanner (scan.h).
const uint8_t* piece_end(Pattern pattern, const uint8_t* begin, const uint8_t* end);

// End of 's 't 're 've 'm 'll 'd at p < end, or p. Case folding adds one character to the ASCII
// ones: U+017F is an s.
const uint8_t* contraction_end(const uint8_t* p, const uint8_t* end, bool any_case);

// Whether a text may be cut after a and b, before c (code points), with the same pieces whatever
// the pattern: where a blank follows a letter, or a letter a newline that stands alone.
bool may_cut(uint32_t a, uint32_t b, uint32_t c);

}  // namespace pygpt
