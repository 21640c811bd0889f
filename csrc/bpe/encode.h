// Text to ids and back, for one vocabulary; safe to use from many threads at once.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "bpe/split.h"
#include "bpe/vocabulary.h"

namespace pygpt {

// A growing array of ids that can be handed over without a copy.
class Ids {
 public:
  Ids() = default;
  Ids(Ids&& other) noexcept { swap(other); }
  Ids& operator=(Ids&& other) noexcept {
    swap(other);
    return *this;
  }
  ~Ids() { std::free(data_); }

  void reserve(size_t extra);  // room for so many more
  size_t room() const { return capacity_ - size_; }
  void push(uint32_t id) {
    reserve(1);
    data_[size_++] = id;
  }
  void clear() { size_ = 0; }
  uint32_t* end() { return data_ + size_; }
  void set_end(const uint32_t* end) { size_ = end - data_; }
  const uint32_t* data() const { return data_; }
  size_t size() const { return size_; }
  uint32_t* release();  // never null, without much spare room; the caller frees it

 private:
  void swap(Ids& other) {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    std::swap(capacity_, other.capacity_);
  }
  uint32_t* data_ = nullptr;
  size_t size_ = 0, capacity_ = 0;
};

// A set of special tokens to look for in a text.
class Specials {
 public:
  struct Match {
    size_t at, size;
    uint32_t id;
  };
  void add(std::string token, uint32_t id);
  // The leftmost match at or after `from`, the longest there; at == npos when there is none.
  Match find(std::string_view text, size_t from) const;
  bool empty() const { return tokens_.empty(); }
  bool any_blank() const;  // in one of them

 private:
  struct Entry {
    std::string bytes;
    uint32_t id;
  };
  std::vector<Entry> tokens_;  // longest first
  std::array<bool, 256> first_{};
};

// The text holds a special token that was not allowed.
struct DisallowedSpecial : std::runtime_error {
  using std::runtime_error::runtime_error;  // what() is the token
};

class PieceCache;

class Bpe {
 public:
  // Without a pattern only pieces that were cut elsewhere can be encoded.
  Bpe(Vocabulary vocabulary, std::optional<Pattern> pattern, Specials specials);
  ~Bpe();

  const Vocabulary& vocabulary() const { return vocabulary_; }
  const Specials& specials() const { return specials_; }
  std::optional<Pattern> pattern() const { return pattern_; }

  // Appends the ids of a text, specials as plain text; with out == nullptr only counts.
  // Returns how many ids the text has. `left`: about so many bytes will follow in other calls, for
  // whose ids room is made too.
  size_t encode_ordinary(std::string_view text, Ids* out, size_t left = 0) const;

  // As above, with `allowed` tokens as single ids; throws DisallowedSpecial for one of
  // `disallowed`.
  size_t encode(std::string_view text, const Specials& allowed, const Specials& disallowed,
                Ids* out, size_t left = 0) const;

  // A piece that was cut elsewhere.
  void encode_piece(std::string_view piece, Ids* out) const;

  // Appends the bytes of the ids. An id that is not in the vocabulary: KeyError.
  void decode(const uint32_t* ids, size_t count, std::string* out) const;

 private:
  friend class Lease;
  Vocabulary vocabulary_;
  std::optional<Pattern> pattern_;
  Specials specials_;
  mutable std::array<std::atomic<PieceCache*>, 16> idle_{};
};

}  // namespace pygpt
