#include "bpe/encode.h"

#include <algorithm>
#include <cstring>
#include <new>

#include "bpe/scan.h"
#include "bpe/unicode.h"
#include "core/error.h"

namespace pygpt {
namespace {

const uint8_t* data_of(std::string_view s) { return reinterpret_cast<const uint8_t*>(s.data()); }

// kKeep[n]: all bits of a key's first n bytes.
constexpr auto kKeep = [] {
  std::array<ShortKey, kShortKey + 1> keep{};
  for (size_t n = 0; n <= kShortKey; ++n) {
    keep[n].low = n < 8 ? (uint64_t{1} << 8 * n) - 1 : ~uint64_t{0};
    keep[n].high = n < 8 ? 0 : (uint64_t{1} << 8 * (n - 8)) - 1;
  }
  return keep;
}();

}  // namespace

void Ids::reserve(size_t extra) {
  if (capacity_ - size_ >= extra) return;
  const size_t wanted = std::max(size_ + extra, capacity_ + capacity_ / 2);
  auto* grown = static_cast<uint32_t*>(std::realloc(data_, wanted * sizeof(uint32_t)));
  if (!grown) throw std::bad_alloc();
  data_ = grown;
  capacity_ = wanted;
}

void Ids::append(const Ids& other) {
  if (!other.size_) return;
  reserve(other.size_);
  std::memcpy(end(), other.data_, other.size_ * sizeof(uint32_t));
  size_ += other.size_;
}

uint32_t* Ids::release() {
  auto* shrunk = static_cast<uint32_t*>(std::realloc(data_, (size_ + 1) * sizeof(uint32_t)));
  if (shrunk) data_ = shrunk;
  capacity_ = size_ = 0;
  return std::exchange(data_, nullptr);
}

void Specials::add(std::string token, uint32_t id) {
  if (token.empty()) throw std::invalid_argument("a special token may not be empty");
  first_[static_cast<uint8_t>(token[0])] = true;
  const auto longer = [&](const Entry& e) { return e.bytes.size() < token.size(); };
  const auto where = std::find_if(tokens_.begin(), tokens_.end(), longer);
  tokens_.insert(where, {std::move(token), id});
}

Specials::Match Specials::find(std::string_view text, size_t from) const {
  if (tokens_.empty()) return {std::string_view::npos, 0, 0};
  const bool one_first = std::count(first_.begin(), first_.end(), true) == 1;
  for (size_t i = from; i < text.size(); ++i) {
    if (one_first) {
      i = text.find(tokens_[0].bytes[0], i);
      if (i == std::string_view::npos) break;
    } else if (!first_[static_cast<uint8_t>(text[i])]) {
      continue;
    }
    for (const Entry& token : tokens_) {
      if (text.compare(i, token.bytes.size(), token.bytes) == 0) {
        return {i, token.bytes.size(), token.id};
      }
    }
  }
  return {std::string_view::npos, 0, 0};
}

// What one thread needs while it encodes: a cache of short pieces and their ids. Two ways a set,
// one cache line a set; a piece of up to three ids is stored in place, so that a hit copies four
// numbers without looking at how many count.
class Workspace {
 public:
  Workspace() : storage_(static_cast<uint8_t*>(std::calloc(kSets * sizeof(Set) + 64, 1))) {
    if (!storage_) throw std::bad_alloc();
    sets_ = reinterpret_cast<Set*>((reinterpret_cast<uintptr_t>(storage_) + 63) & ~uintptr_t{63});
  }
  ~Workspace() { std::free(storage_); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  // Writes the ids of a piece at `out`, which has room for its bytes + 4; returns their end.
  uint32_t* encode(const Vocabulary& vocabulary, const uint8_t* piece, size_t size, uint32_t* out) {
    if (size > kShortKey) return encode_long(vocabulary, piece, size, out);
    return encode_short(vocabulary, short_key(piece, size), piece, out);
  }

  // The same for all pieces of a batch.
  uint32_t* encode(const Vocabulary& vocabulary, const PieceScanner& batch, uint32_t* out) {
    const uint32_t* const starts = batch.starts();
    for (size_t i = 0; i < batch.pieces(); ++i) {
      const uint8_t* const piece = batch.base() + starts[i];
      const size_t size = starts[i + 1] - starts[i];
      if (size > kShortKey) {
        out = encode_long(vocabulary, piece, size, out);
        continue;
      }
      ShortKey key;
      std::memcpy(&key, piece, sizeof key);
      key.low &= kKeep[size].low;
      key.high = (key.high & kKeep[size].high) | uint64_t{size} << 56;
      out = encode_short(vocabulary, key, piece, out);
    }
    return out;
  }

 private:
  static constexpr int kSetBits = 16;
  static constexpr size_t kSets = size_t{1} << kSetBits;
  static constexpr uint32_t kInPlace = 3;
  static constexpr size_t kMoreLimit = 1 << 18;
  struct Way {
    ShortKey key;
    uint32_t ids[kInPlace];  // or, where there are more, ids[0] is their place in more_
    uint32_t count;
  };
  struct Set {
    Way ways[2];
  };

  uint32_t* encode_short(const Vocabulary& vocabulary, ShortKey key, const uint8_t* piece,
                         uint32_t* out) {
    Set& set = sets_[hash_of(key) >> (64 - kSetBits)];
    const bool first = set.ways[0].key == key, second = set.ways[1].key == key;
    if (first | second) [[likely]]
      return copy(set.ways[first ? 0 : 1], out);
    return miss(vocabulary, key, piece, set, out);
  }

  uint32_t* copy(const Way& way, uint32_t* out) const {
    std::memcpy(out, way.ids, 4 * sizeof(uint32_t));
    if (way.count > kInPlace) [[unlikely]] {
      std::memcpy(out, more_.data() + way.ids[0], way.count * sizeof(uint32_t));
    }
    return out + way.count;
  }

  [[gnu::noinline]] uint32_t* miss(const Vocabulary& vocabulary, ShortKey key, const uint8_t* piece,
                                   Set& set, uint32_t* out) {
    const size_t size = key.high >> 56;
    uint32_t ids[kShortKey] = {vocabulary.whole(piece, size)};
    uint32_t count = 1;
    if (ids[0] == Vocabulary::kNoToken) {
      count = static_cast<uint32_t>(vocabulary.merge(piece, size, ids));
    }
    Way way{key, {ids[0], ids[1], ids[2]}, count};
    if (count > kInPlace) {
      if (more_.size() > kMoreLimit) {  // forget everything rather than grow
        std::memset(static_cast<void*>(sets_), 0, kSets * sizeof(Set));
        more_.clear();
      }
      way.ids[0] = static_cast<uint32_t>(more_.size());
      more_.insert(more_.end(), ids, ids + count);
    }
    set.ways[1] = set.ways[0];
    set.ways[0] = way;
    return copy(way, out);
  }

  uint32_t* encode_long(const Vocabulary& vocabulary, const uint8_t* piece, size_t size,
                        uint32_t* out) {
    const uint32_t id = vocabulary.whole(piece, size);
    if (id == Vocabulary::kNoToken) return out + vocabulary.merge(piece, size, out);
    *out = id;
    return out + 1;
  }

  uint8_t* storage_;
  Set* sets_;
  std::vector<uint32_t> more_;
};

// Borrows a workspace of a Bpe; a new one is made when all are in use. No lock, so that a fork at
// any moment leaves the child able to encode.
class Lease {
 public:
  explicit Lease(const Bpe& bpe) : bpe_(bpe) {
    for (auto& slot : bpe.idle_) {
      if (slot.load(std::memory_order_relaxed) && (workspace_ = slot.exchange(nullptr))) return;
    }
    workspace_ = new Workspace;
  }
  ~Lease() {
    for (auto& slot : bpe_.idle_) {
      Workspace* empty = nullptr;
      if (slot.compare_exchange_strong(empty, workspace_)) return;
    }
    delete workspace_;
  }
  Lease(const Lease&) = delete;
  Lease& operator=(const Lease&) = delete;
  Workspace* operator->() const { return workspace_; }

 private:
  const Bpe& bpe_;
  Workspace* workspace_ = nullptr;
};

Bpe::Bpe(Vocabulary vocabulary, std::optional<Pattern> pattern, Specials specials)
    : vocabulary_(std::move(vocabulary)), pattern_(pattern), specials_(std::move(specials)) {}

Bpe::~Bpe() {
  for (auto& slot : idle_) delete slot.load();
}

size_t Bpe::encode_ordinary(std::string_view text, Ids* out) const {
  if (!pattern_) throw std::logic_error("this vocabulary has no native pattern");
  Ids scratch;
  Ids& ids = out ? *out : scratch;
  const Lease workspace(*this);
  const size_t before = ids.size();
  size_t counted = 0;
  for (PieceScanner pieces(*pattern_, data_of(text), text.size()); pieces.next();) {
    ids.reserve(pieces.starts()[pieces.pieces()] + 4);
    ids.set_end(workspace->encode(vocabulary_, pieces, ids.end()));
    if (!out) {
      counted += ids.size();
      ids.clear();
    }
  }
  return out ? ids.size() - before : counted;
}

size_t Bpe::encode(std::string_view text, const Specials& allowed, const Specials& disallowed,
                   Ids* out) const {
  if (const auto match = disallowed.find(text, 0); match.at != std::string_view::npos) {
    throw DisallowedSpecial(std::string(text.substr(match.at, match.size)));
  }
  size_t count = 0;
  for (size_t from = 0;;) {
    const auto match = allowed.find(text, from);
    count += encode_ordinary(text.substr(from, match.at - from), out);
    if (match.at == std::string_view::npos) return count;
    if (out) out->push(match.id);
    ++count;
    from = match.at + match.size;
  }
}

void Bpe::encode_piece(std::string_view piece, Ids* out) const {
  if (piece.empty()) return;
  const Lease workspace(*this);
  out->reserve(piece.size() + 4);
  out->set_end(workspace->encode(vocabulary_, data_of(piece), piece.size(), out->end()));
}

void Bpe::decode(const uint32_t* ids, size_t count, std::string* out) const {
  const Vocabulary::Entry* entries = vocabulary_.entries();
  constexpr size_t kBatch = 1024;
  for (size_t begin = 0; begin < count; begin += kBatch) {
    const size_t end = std::min(count, begin + kBatch);
    size_t used = out->size();
    out->resize(used + kBatch * 16);
    char* to = out->data() + used;
    for (size_t i = begin; i < end; ++i) {
      if (ids[i] >= vocabulary_.size() || entries[ids[i]].size == 0) {
        throw KeyError("Invalid token for decoding: " + std::to_string(ids[i]));
      }
      const Vocabulary::Entry& entry = entries[ids[i]];
      if (entry.size == Vocabulary::kLong) {
        const std::string_view bytes = vocabulary_.bytes(ids[i]);
        used = to - out->data();
        out->resize(used + bytes.size() + kBatch * 16);
        std::memcpy(out->data() + used, bytes.data(), bytes.size());
        to = out->data() + used + bytes.size();
      } else {
        std::memcpy(to, &entry, 16);
        to += entry.size;
      }
    }
    out->resize(to - out->data());
  }
}

size_t last_safe_cut(std::string_view text) {
  const uint8_t *begin = data_of(text), *end = begin + text.size();
  for (const uint8_t* p = end - 1; p > begin; --p) {
    if (*p != ' ' && *p != '\n') continue;
    const uint8_t* before = p - 1;
    while (before > begin && (*before & 0xC0) == 0x80) --before;
    const CharClass cls = char_at(before, p).cls;
    if (cls == kUpper || cls == kLower || cls == kCaseless) return p - begin;
  }
  return 0;
}

}  // namespace pygpt
