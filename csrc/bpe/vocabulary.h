// A vocabulary: the bytes of every token, the merge rules, and which tokens a whole piece may be.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "bpe/merge.h"

namespace pygpt {

struct Token {
  std::string bytes;
  uint32_t id;
};

// A piece or token of at most 15 bytes, zero-padded, and its size.
struct ShortKey {
  uint64_t low, high;  // size in the last byte
  bool operator==(const ShortKey&) const = default;
};
inline uint64_t hash_of(ShortKey key) {
  const auto product = static_cast<unsigned __int128>(key.low ^ 0x9E3779B97F4A7C15u) *
                       (key.high ^ 0xC2B2AE3D27D4EB4Fu);
  return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}
ShortKey short_key(const uint8_t* bytes, size_t size);  // size <= kShortKey
constexpr size_t kShortKey = 15;

// kKeep[n] keeps the first n bytes of a key; `high` of a piece that is too long is like no short
// one's.
struct Keep {
  uint64_t low, high, size;
};
inline constexpr auto kKeep = [] {
  std::array<Keep, kShortKey + 2> keep{};
  for (size_t n = 0; n <= kShortKey + 1; ++n) {
    keep[n].low = n < 8 ? (uint64_t{1} << 8 * n) - 1 : ~uint64_t{0};
    keep[n].high = n < 8 ? 0 : (uint64_t{1} << 8 * (std::min(n, kShortKey) - 8)) - 1;
    keep[n].size = uint64_t{n} << 56;
  }
  return keep;
}();

// In place of a key, for more bytes: a hash and their number. Different bytes may share it.
ShortKey long_key(const uint8_t* bytes, size_t size);

// The key of a piece with 16 readable bytes.
inline ShortKey key_at(const uint8_t* piece, size_t size) {
  ShortKey key;
  std::memcpy(&key, piece, sizeof key);
  const Keep& keep = kKeep[std::min(size, kShortKey + 1)];
  return {key.low & keep.low, (key.high & keep.high) | keep.size};
}

inline ShortKey key_of(const uint8_t* bytes, size_t size) {
  return size <= kShortKey ? short_key(bytes, size) : long_key(bytes, size);
}
inline uint64_t hash_bytes(const uint8_t* bytes, size_t size) {
  return hash_of(key_of(bytes, size));
}

class Vocabulary {
 public:
  static constexpr uint32_t kNoToken = ~0u;
  static constexpr uint32_t kMaxId = (1u << 24) - 1;

  // tiktoken's rule: ids are ranks, and two neighbours merge when their bytes together are a token.
  // Throws std::invalid_argument for duplicates, missing single bytes, or too large ids.
  explicit Vocabulary(std::vector<Token> tokens);

  // Hugging Face's rule: only the given pairs of ids merge, the first in the list first.
  // A whole piece that is a token is taken as it is only where `whole_pieces`.
  Vocabulary(std::vector<Token> tokens, const std::vector<std::pair<uint32_t, uint32_t>>& merges,
             bool whole_pieces);

  // For decoding only: does not take part in merging.
  void add_special(const std::string& bytes, uint32_t id);

  uint32_t size() const { return static_cast<uint32_t>(entries_.size()); }  // largest id + 1
  bool has(uint32_t id) const { return id < entries_.size() && entries_[id].size != 0; }
  std::string_view bytes(uint32_t id) const;  // of an id that it has

  // Id of the token that may stand for this whole piece, or kNoToken.
  uint32_t whole(const uint8_t* piece, size_t size) const {
    return whole(piece, size, hash_bytes(piece, size));
  }
  uint32_t whole(const uint8_t* piece, size_t size, uint64_t hash) const;
  void prefetch(uint64_t hash) const { __builtin_prefetch(&whole_[whole_slot(hash)]); }

  // Ids of a piece by merging alone; `out` has room for `size`.
  size_t merge(const uint8_t* piece, size_t size, uint32_t* out) const;

  // Whether a piece may be cut before `p`, where a character of several bytes begins at least two
  // bytes into the piece: true only if no token has such bytes on both sides of a cut.
  bool cuts_before(const uint8_t* p) const {
    uint32_t around;
    std::memcpy(&around, p - 2, sizeof around);
    const uint32_t bit = joint(around);
    return !(joints_[bit >> 6] >> (bit & 63) & 1) && !joined_pairs_[p[-1] << 8 | p[0]];
  }
  // False where a whole piece may be a token that merging does not give: then no piece is cut.
  bool cuts_pieces() const { return cuts_pieces_; }

  // Pairs of ids in order of rank.
  std::vector<std::pair<uint32_t, uint32_t>> merges() const;

  // True when merging gives each token from its own bytes.
  bool all_reachable() const { return all_reachable_; }

  // A token as decoding copies it: 15 bytes at once.
  struct Entry {
    uint8_t bytes[kShortKey];  // or, where size is kLong, offset and size in long_bytes_ (uint32)
    uint8_t size;              // 0: no such token
  };
  static constexpr uint8_t kLong = 255;
  const Entry* entries() const { return entries_.data(); }

 private:
  void store(const Token& token);
  void number_symbols(const std::vector<Token>& tokens);
  void index_whole(const std::vector<Token>& tokens, const std::vector<bool>& allowed);

  void index_joints(const std::vector<Token>& tokens);
  static constexpr int kIdBits = 24;
  static constexpr uint64_t kEmpty = ~uint64_t{0};
  size_t whole_slot(uint64_t hash) const { return (hash >> 32) * whole_.size() >> 32; }
  size_t after_slot(size_t i) const { return i + 1 == whole_.size() ? 0 : i + 1; }

  static constexpr int kJointBits = 20;
  static uint32_t joint(uint32_t around) { return around * 0x9E3779B1u >> (32 - kJointBits); }

  MergeRules rules_;
  std::vector<Entry> entries_;  // by id
  std::string long_bytes_;
  std::vector<uint32_t> symbol_id_;  // symbol -> id
  std::vector<uint64_t>
      whole_;  // open addressing: upper bits of the hash, id in kIdBits; or kEmpty
  bool all_reachable_ = true;
  bool cuts_pieces_ = true;
  // Hashes of two bytes before and two after every place in a token where a character of several
  // bytes begins; and the tokens of two bytes that have such a place.
  std::vector<uint64_t> joints_;
  std::vector<bool> joined_pairs_;
};

// Readers of vocabulary files; std::invalid_argument says which line is wrong.
std::vector<Token> parse_tiktoken(std::string_view file);
std::vector<Token> parse_gpt2_merges(std::string_view file);

// The character that GPT-2's files write for a byte, as a code point, and the order of its ids.
uint32_t gpt2_character(uint8_t byte);
const uint8_t* gpt2_byte_order();  // 256 bytes

}  // namespace pygpt
