#include "bpe/split.h"

#include <initializer_list>

#include "bpe/unicode.h"

namespace pygpt {
namespace {

using Ptr = const uint8_t*;

constexpr unsigned bit(CharClass cls) { return 1u << cls; }
constexpr unsigned kLetter = bit(kUpper) | bit(kLower) | bit(kCaseless);
constexpr unsigned kBlank = bit(kSpace) | bit(kNewline);
constexpr unsigned kNumeral = bit(kNumber);
constexpr unsigned kSymbol = bit(kOther) | bit(kMark);
constexpr unsigned kUpperPart = bit(kUpper) | bit(kCaseless) | bit(kMark);
constexpr unsigned kLowerPart = bit(kLower) | bit(kCaseless) | bit(kMark);

bool is(unsigned set, Char c) { return set >> c.cls & 1; }
bool is_at(unsigned set, Ptr p, Ptr end) { return p < end && is(set, char_at(p, end)); }

Ptr skip(unsigned set, Ptr p, Ptr end) {
  while (p < end) {
    const Char c = char_at(p, end);
    if (!is(set, c)) break;
    p += c.size;
  }
  return p;
}

struct Blanks {
  Ptr last;           // its last character
  Ptr after_newline;  // just after its last CR or LF, or null
  Ptr end;
};

Blanks blanks(Ptr p, Ptr end) {
  Blanks run{p, nullptr, p};
  while (run.end < end) {
    const Char c = char_at(run.end, end);
    if (!is(kBlank, c)) break;
    run.last = run.end;
    run.end += c.size;
    if (c.cls == kNewline) run.after_newline = run.end;
  }
  return run;
}

// \s+(?!\S)|\s : a run leaves its last character to the piece that follows.
Ptr all_but_last(const Blanks& run, Ptr begin, Ptr end) {
  return run.end == end || run.last == begin ? run.end : run.last;
}

Ptr gpt2(Ptr p, Ptr end) {
  if (const Ptr q = contraction_end(p, end, false); q != p) return q;
  const Ptr q = *p == ' ' ? p + 1 : p;
  for (const unsigned set : {kLetter, kNumeral, kSymbol}) {
    if (is_at(set, q, end)) return skip(set, q, end);
  }
  return all_but_last(blanks(p, end), p, end);
}

// \p{N}{1,3}
Ptr three_numerals(Ptr p, Ptr end) {
  for (int i = 0; i < 3 && is_at(kNumeral, p, end); ++i) p += char_at(p, end).size;
  return p;
}

Ptr cl100k(Ptr p, Ptr end) {
  if (const Ptr q = contraction_end(p, end, true); q != p) return q;
  const Char c = char_at(p, end);
  const Ptr word = is(kLetter | kNumeral | bit(kNewline), c) ? p : p + c.size;
  if (is_at(kLetter, word, end)) return skip(kLetter, word, end);
  if (is(kNumeral, c)) return three_numerals(p, end);
  const Ptr symbols = *p == ' ' ? p + 1 : p;
  if (is_at(kSymbol, symbols, end)) {
    return skip(bit(kNewline), skip(kSymbol, symbols, end), end);
  }
  const Blanks run = blanks(p, end);
  if (run.end != end && run.after_newline) return run.after_newline;
  return all_but_last(run, p, end);
}

// [upper]*[lower]+ at p, or null. The upper part takes all it can, then gives back what the lower
// part needs: when no lower-case letter follows, everything after the last character of both sets.
Ptr cased_word(Ptr p, Ptr end) {
  Ptr after_both = nullptr;
  while (p < end) {
    const Char c = char_at(p, end);
    if (!is(kUpperPart, c)) break;
    p += c.size;
    if (is(kLowerPart, c)) after_both = p;
  }
  return is_at(bit(kLower), p, end) ? skip(kLowerPart, p, end) : after_both;
}

Ptr o200k(Ptr p, Ptr end) {
  const Char c = char_at(p, end);
  const bool prefix = !is(kLetter | kNumeral | bit(kNewline), c);
  Ptr q = prefix ? cased_word(p + c.size, end) : nullptr;
  if (!q) q = cased_word(p, end);
  if (!q && prefix && is_at(kUpperPart, p + c.size, end)) q = skip(kUpperPart, p + c.size, end);
  if (!q && is(kUpperPart, c)) q = skip(kUpperPart, p, end);
  if (q) return contraction_end(q, end, true);
  if (is(kNumeral, c)) return three_numerals(p, end);
  const Ptr symbols = *p == ' ' ? p + 1 : p;
  if (is_at(kSymbol, symbols, end)) {
    q = skip(kSymbol, symbols, end);
    while (q < end && (*q == '\r' || *q == '\n' || *q == '/')) ++q;
    return q;
  }
  const Blanks run = blanks(p, end);
  return run.after_newline ? run.after_newline : all_but_last(run, p, end);
}

}  // namespace

const uint8_t* contraction_end(const uint8_t* p, const uint8_t* end, bool any_case) {
  if (end - p < 2 || *p != '\'') return p;
  const uint8_t fold = any_case ? 0x20 : 0;
  const uint8_t a = p[1] | fold;
  if (a == 's' || a == 'd' || a == 'm' || a == 't') return p + 2;
  if (end - p < 3) return p;
  if (any_case && p[1] == 0xC5 && p[2] == 0xBF) return p + 3;
  const uint8_t b = p[2] | fold;
  const bool two = (a == 'l' && b == 'l') || (a == 'v' && b == 'e') || (a == 'r' && b == 'e');
  return two ? p + 3 : p;
}

const uint8_t* piece_end(Pattern pattern, const uint8_t* begin, const uint8_t* end) {
  switch (pattern) {
    case Pattern::kGpt2:
      return gpt2(begin, end);
    case Pattern::kCl100k:
      return cl100k(begin, end);
    case Pattern::kO200k:
      return o200k(begin, end);
  }
  return end;
}

bool may_cut(CharClass a, CharClass b, CharClass c) {
  const auto among = [](unsigned set, CharClass cls) { return (set >> cls & 1) != 0; };
  if (among(kBlank, c)) return among(kLetter, b);
  return b == kNewline && among(kLetter, c) && !among(kBlank, a);
}

size_t last_safe_cut(std::string_view text) {
  const Ptr begin = reinterpret_cast<Ptr>(text.data());
  // Goes back over the character that ends at p. Bytes that are none are like a symbol, and what
  // comes before the text may be a blank.
  const auto step_back = [&](Ptr& p) {
    if (p == begin) return kSpace;
    const Ptr end = p--;
    while (p > begin && (*p & 0xC0) == 0x80) --p;
    const Char c = char_at(p, end);
    return c.size == end - p ? c.cls : kOther;
  };
  Ptr at_c = begin + text.size();
  CharClass c = step_back(at_c);
  Ptr at_b = at_c;
  CharClass b = step_back(at_b);
  while (at_c > begin) {
    Ptr at_a = at_b;
    const CharClass a = step_back(at_a);
    if (may_cut(a, b, c)) return at_c - begin;
    at_c = at_b;
    at_b = at_a;
    c = b;
    b = a;
  }
  return 0;
}

}  // namespace pygpt
