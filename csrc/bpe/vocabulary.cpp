#include "bpe/vocabulary.h"

#include <algorithm>
#include <array>
#include <bit>
#include <charconv>
#include <cstring>
#include <numeric>
#include <stdexcept>

namespace pygpt {
namespace {

std::string printable(std::string_view bytes) {
  std::string text;
  for (const unsigned char c : bytes) {
    if (c >= 32 && c < 127) {
      text += static_cast<char>(c);
    } else {
      constexpr char digits[] = "0123456789abcdef";
      text += {'\\', 'x', digits[c >> 4], digits[c & 15]};
    }
  }
  return "'" + text + "'";
}

const uint8_t* data_of(std::string_view s) { return reinterpret_cast<const uint8_t*>(s.data()); }

struct Gpt2Bytes {
  std::array<uint8_t, 256> order;       // id -> byte
  std::array<uint16_t, 256> character;  // byte -> code point
  Gpt2Bytes() {
    int seen = 0, moved = 0;
    const auto printable = [](int b) {
      return (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
    };
    for (int b = 0; b < 256; ++b) {
      if (printable(b)) order[seen++] = static_cast<uint8_t>(b);
      character[b] = static_cast<uint16_t>(printable(b) ? b : 256 + moved++);
    }
    for (int b = 0; b < 256; ++b) {
      if (!printable(b)) order[seen++] = static_cast<uint8_t>(b);
    }
  }
};
const Gpt2Bytes kGpt2Bytes;

}  // namespace

uint32_t gpt2_character(uint8_t byte) { return kGpt2Bytes.character[byte]; }
const uint8_t* gpt2_byte_order() { return kGpt2Bytes.order.data(); }

ShortKey short_key(const uint8_t* bytes, size_t size) {
  uint8_t key[16] = {};
  std::memcpy(key, bytes, size);
  key[kShortKey] = static_cast<uint8_t>(size);
  return std::bit_cast<ShortKey>(key);
}

ShortKey long_key(const uint8_t* bytes, size_t size) {
  ShortKey words{size, 0};
  for (size_t i = 0; i + 8 < size; i += 8) {
    std::memcpy(&words.high, bytes + i, 8);
    words.low ^= hash_of(words);
  }
  std::memcpy(&words.high, bytes + size - 8, 8);
  return {hash_of(words), uint64_t{kShortKey + 1} << 56 | size};
}

void Vocabulary::store(const Token& token) {
  if (token.bytes.empty()) {
    throw std::invalid_argument("token " + std::to_string(token.id) + " is empty");
  }
  if (token.id > kMaxId) {
    throw std::invalid_argument("token id " + std::to_string(token.id) + " is larger than " +
                                std::to_string(kMaxId));
  }
  if (has(token.id)) {
    throw std::invalid_argument("token id " + std::to_string(token.id) + " is given twice, for " +
                                printable(bytes(token.id)) + " and " + printable(token.bytes));
  }
  if (entries_.size() <= token.id) entries_.resize(token.id + 1);
  Entry& entry = entries_[token.id];
  const size_t size = token.bytes.size();
  if (size <= kShortKey) {
    std::memcpy(entry.bytes, token.bytes.data(), size);
    entry.size = static_cast<uint8_t>(size);
    return;
  }
  const uint32_t where[2] = {static_cast<uint32_t>(long_bytes_.size()),
                             static_cast<uint32_t>(size)};
  if (long_bytes_.size() + size > UINT32_MAX) {
    throw std::invalid_argument("the tokens' bytes together exceed 4 GiB");
  }
  std::memcpy(entry.bytes, where, sizeof where);
  entry.size = kLong;
  long_bytes_ += token.bytes;
}

std::string_view Vocabulary::bytes(uint32_t id) const {
  const Entry& entry = entries_[id];
  if (entry.size != kLong) return {reinterpret_cast<const char*>(entry.bytes), entry.size};
  uint32_t where[2];
  std::memcpy(where, entry.bytes, sizeof where);
  return {long_bytes_.data() + where[0], where[1]};
}

void Vocabulary::number_symbols(const std::vector<Token>& tokens) {
  if (tokens.size() >= MergeRules::kNone) {
    throw std::invalid_argument("a vocabulary of " + std::to_string(tokens.size()) +
                                " tokens is larger than 2,097,150");
  }
  symbol_id_.assign(256, kNoToken);
  entries_.reserve(tokens.size() + 64);
  for (const Token& token : tokens) {
    store(token);
    if (token.bytes.size() == 1) {
      uint32_t& id = symbol_id_[static_cast<uint8_t>(token.bytes[0])];
      if (id != kNoToken) {
        throw std::invalid_argument("token " + printable(token.bytes) + " is given twice");
      }
      id = token.id;
    } else {
      symbol_id_.push_back(token.id);
    }
  }
  const auto missing = std::count(symbol_id_.begin(), symbol_id_.begin() + 256, kNoToken);
  if (missing) {
    throw std::invalid_argument("a byte-level vocabulary needs all 256 single bytes; " +
                                std::to_string(missing) + " are missing");
  }
}

void Vocabulary::index_whole(const std::vector<Token>& tokens, const std::vector<bool>& allowed) {
  whole_.assign(tokens.size() * 5 / 3 + 16, kEmpty);
  for (size_t t = 0; t < tokens.size(); ++t) {
    const std::string& key = tokens[t].bytes;
    const uint64_t hash = hash_bytes(data_of(key), key.size());
    if (whole(data_of(key), key.size(), hash) != kNoToken) {
      throw std::invalid_argument("token " + printable(key) + " is given twice");
    }
    if (!allowed[t]) continue;
    size_t i = whole_slot(hash);
    while (whole_[i] != kEmpty) i = after_slot(i);
    whole_[i] = hash >> kIdBits << kIdBits | tokens[t].id;
  }
}

void Vocabulary::index_joints(const std::vector<Token>& tokens) {
  joints_.assign((size_t{1} << kJointBits) / 64, 0);
  joined_pairs_.assign(65536, false);
  const auto add = [&](uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    const uint32_t bit = joint(a | b << 8 | c << 16 | d << 24);
    joints_[bit >> 6] |= uint64_t{1} << (bit & 63);
  };
  for (const Token& token : tokens) {
    const uint8_t* const t = data_of(token.bytes);
    const size_t size = token.bytes.size();
    for (size_t p = 1; p < size; ++p) {
      if (t[p] < 0xC0) continue;
      if (p > 1 && p + 1 < size) {
        add(t[p - 2], t[p - 1], t[p], t[p + 1]);
      } else if (p > 1) {  // whatever follows: it is a continuation byte
        for (uint32_t d = 0x80; d < 0xC0; ++d) add(t[p - 2], t[p - 1], t[p], d);
      } else if (p + 1 < size) {
        for (uint32_t a = 0; a < 256; ++a) add(a, t[p - 1], t[p], t[p + 1]);
      } else {
        joined_pairs_[t[p - 1] << 8 | t[p]] = true;
      }
    }
  }
}

uint32_t Vocabulary::whole(const uint8_t* piece, size_t size, uint64_t hash) const {
  for (size_t i = whole_slot(hash); whole_[i] != kEmpty; i = after_slot(i)) {
    if ((whole_[i] ^ hash) >> kIdBits) continue;
    const auto id = static_cast<uint32_t>(whole_[i] & kMaxId);
    const std::string_view token = bytes(id);
    if (token.size() == size && std::memcmp(token.data(), piece, size) == 0) return id;
  }
  return kNoToken;
}

// While a token forms inside a text, the merges within its span are those of its bytes alone, in
// the same order: a merge across the border would prevent it. So the last merge of a token's own
// bytes is the only pair of symbols that can ever become this token, and one rule a token replaces
// the look-up of concatenated bytes. Tokens inside it are shorter: rules are made by length.
Vocabulary::Vocabulary(std::vector<Token> tokens) : rules_(tokens.size()) {
  std::sort(tokens.begin(), tokens.end(),
            [](const Token& a, const Token& b) { return a.id < b.id; });
  number_symbols(tokens);
  std::vector<uint32_t> order;  // of longer tokens, by length
  std::vector<uint32_t> rank(tokens.size());
  order.reserve(tokens.size());
  size_t longest = 0;
  for (uint32_t t = 0, next_rank = 0; t < tokens.size(); ++t) {
    longest = std::max(longest, tokens[t].bytes.size());
    if (tokens[t].bytes.size() == 1) continue;
    rank[t] = next_rank++;
    order.push_back(t);
  }
  std::stable_sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) {
    return tokens[a].bytes.size() < tokens[b].bytes.size();
  });
  std::vector<uint32_t> symbols(longest);
  for (const uint32_t t : order) {
    const std::string& bytes = tokens[t].bytes;
    if (rules_.merge(data_of(bytes), bytes.size(), symbols.data()) != 2) {
      all_reachable_ = false;
      continue;
    }
    rules_.add(symbols[0], symbols[1], rank[t], 256 + rank[t]);
  }
  index_whole(tokens, std::vector<bool>(tokens.size(), true));
  index_joints(tokens);
  cuts_pieces_ = all_reachable_;
}

Vocabulary::Vocabulary(std::vector<Token> tokens,
                       const std::vector<std::pair<uint32_t, uint32_t>>& merges, bool whole_pieces)
    : rules_(merges.size()) {
  number_symbols(tokens);
  index_whole(tokens, std::vector<bool>(tokens.size(), true));
  std::vector<uint32_t> symbol_of(entries_.size());
  for (uint32_t s = 0; s < symbol_id_.size(); ++s) symbol_of[symbol_id_[s]] = s;
  std::string joined;
  for (uint32_t rank = 0; rank < merges.size(); ++rank) {
    const auto [left, right] = merges[rank];
    const std::string where = "merge " + std::to_string(rank + 1) + ": ";
    if (!has(left) || !has(right)) throw std::invalid_argument(where + "its parts are not tokens");
    joined.assign(bytes(left)).append(bytes(right));
    const uint32_t id = whole(data_of(joined), joined.size());
    if (id == kNoToken) {
      throw std::invalid_argument(where + printable(joined) + " is not a token");
    }
    if (!rules_.add(symbol_of[left], symbol_of[right], rank, symbol_of[id])) {
      throw std::invalid_argument(where + printable(bytes(left)) + " and " +
                                  printable(bytes(right)) + " are merged twice");
    }
  }
  std::vector<bool> allowed(tokens.size());
  std::vector<uint32_t> symbols;
  for (size_t t = 0; t < tokens.size(); ++t) {
    const std::string& bytes = tokens[t].bytes;
    symbols.resize(std::max(symbols.size(), bytes.size()));
    const bool reachable = rules_.merge(data_of(bytes), bytes.size(), symbols.data()) == 1;
    all_reachable_ = all_reachable_ && reachable;
    allowed[t] = whole_pieces || reachable;
  }
  index_whole(tokens, allowed);
  index_joints(tokens);
  cuts_pieces_ = all_reachable_ || !whole_pieces;
}

void Vocabulary::add_special(const std::string& bytes, uint32_t id) { store({bytes, id}); }

size_t Vocabulary::merge(const uint8_t* piece, size_t size, uint32_t* out) const {
  const size_t count = rules_.merge(piece, size, out);
  for (size_t i = 0; i < count; ++i) out[i] = symbol_id_[out[i]];
  return count;
}

std::vector<std::pair<uint32_t, uint32_t>> Vocabulary::merges() const {
  std::vector<std::pair<uint32_t, uint32_t>> pairs;
  for (const auto& [left, right] : rules_.pairs()) {
    if (left != MergeRules::kNone) pairs.emplace_back(symbol_id_[left], symbol_id_[right]);
  }
  return pairs;
}

namespace {

// Calls line(text, number) for each line, without its CR LF or LF.
template <class Line>
void each_line(std::string_view file, const Line& line) {
  for (size_t number = 1; !file.empty(); ++number) {
    const size_t end = std::min(file.find('\n'), file.size());
    std::string_view text = file.substr(0, end);
    if (!text.empty() && text.back() == '\r') text.remove_suffix(1);
    line(text, number);
    file.remove_prefix(std::min(end + 1, file.size()));
  }
}

[[noreturn]] void bad_line(size_t number, const char* expected) {
  throw std::invalid_argument("line " + std::to_string(number) + ": expected " + expected);
}

bool decode_base64(std::string_view text, std::string& out) {
  static const auto values = [] {
    std::array<int8_t, 256> table;
    table.fill(-1);
    constexpr char alphabet[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    for (int i = 0; i < 64; ++i) table[static_cast<uint8_t>(alphabet[i])] = static_cast<int8_t>(i);
    return table;
  }();
  out.clear();
  if (text.size() % 4) return false;
  size_t padding = 0;
  while (padding < 2 && !text.empty() && text.back() == '=') text.remove_suffix(1), ++padding;
  uint32_t bits = 0;
  int held = 0;
  for (const unsigned char c : text) {
    if (values[c] < 0) return false;
    bits = bits << 6 | static_cast<uint32_t>(values[c]);
    held += 6;
    if (held >= 8) {
      held -= 8;
      out += static_cast<char>(bits >> held & 255);
    }
  }
  return (bits & ((1u << held) - 1)) == 0;
}

}  // namespace

std::vector<Token> parse_tiktoken(std::string_view file) {
  std::vector<Token> tokens;
  tokens.reserve(file.size() / 16);
  each_line(file, [&](std::string_view line, size_t number) {
    if (line.empty()) return;
    const size_t space = line.find(' ');
    Token token;
    if (space == std::string_view::npos || !decode_base64(line.substr(0, space), token.bytes)) {
      bad_line(number, "base64, a space and a rank");
    }
    const char *first = line.data() + space + 1, *last = line.data() + line.size();
    const auto [end, error] = std::from_chars(first, last, token.id);
    if (error != std::errc() || end != last) bad_line(number, "a rank after the space");
    tokens.push_back(std::move(token));
  });
  return tokens;
}

std::vector<Token> parse_gpt2_merges(std::string_view file) {
  static const auto bytes_of = [] {
    std::array<int16_t, 512> table;
    table.fill(-1);
    for (int b = 0; b < 256; ++b) table[gpt2_character(static_cast<uint8_t>(b))] = b;
    return table;
  }();
  std::vector<Token> tokens;
  for (uint32_t id = 0; id < 256; ++id) {
    tokens.push_back({std::string(1, static_cast<char>(gpt2_byte_order()[id])), id});
  }
  each_line(file, [&](std::string_view line, size_t number) {
    if (line.empty() || (number == 1 && line.starts_with("#version"))) return;
    Token token{{}, static_cast<uint32_t>(tokens.size())};
    int spaces = 0;
    for (size_t i = 0; i < line.size(); ++i) {
      uint32_t code = static_cast<uint8_t>(line[i]);
      if (code == ' ') {
        ++spaces;
        continue;
      }
      if (code >= 0xC0 && code < 0xE0 && i + 1 < line.size()) {
        code = (code & 0x1F) << 6 | (static_cast<uint8_t>(line[++i]) & 0x3F);
      }
      if (code >= bytes_of.size() || bytes_of[code] < 0) {
        bad_line(number, "the characters that GPT-2's files write for bytes");
      }
      token.bytes += static_cast<char>(bytes_of[code]);
    }
    if (spaces != 1 || line.front() == ' ' || line.back() == ' ') {
      bad_line(number, "two parts with one space between");
    }
    tokens.push_back(std::move(token));
  });
  return tokens;
}

}  // namespace pygpt
