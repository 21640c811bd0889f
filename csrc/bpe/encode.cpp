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

// The last 2^bits items that were added, in runs; a run's place stays valid until it is
// overwritten.
template <class Item, int bits>
class Ring {
 public:
  uint64_t add(const Item* items, size_t count) {  // count <= kSpare
    if ((head_ & kMask) + count > kSize) head_ = (head_ | kMask) + 1;
    std::memcpy(items_.data() + (head_ & kMask), items, count * sizeof(Item));
    const uint64_t place = head_;
    head_ += count;
    return place;
  }
  const Item* find(uint64_t place) const {
    return head_ - place <= kSize - kSpare ? items_.data() + (place & kMask) : nullptr;
  }

 private:
  static constexpr uint64_t kSize = uint64_t{1} << bits, kMask = kSize - 1, kSpare = 64;
  std::vector<Item> items_ = std::vector<Item>(kSize);
  uint64_t head_ = 0;
};

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
    const ShortKey key = short_key(piece, size);
    return encode_short(vocabulary, key, *set_of(key), piece, out);
  }

  // The same for all pieces of a batch. Waiting for the cache's memory is what costs most: the keys
  // of a group are made first, and their places fetched ahead.
  uint32_t* encode(const Vocabulary& vocabulary, const PieceScanner& batch, uint32_t* out) {
    constexpr size_t kGroup = 32;
    ShortKey keys[kGroup];
    Set* sets[kGroup];
    const uint8_t* const base = batch.base();
    for (size_t begin = 0; begin < batch.pieces(); begin += kGroup) {
      const uint32_t* const starts = batch.starts() + begin;
      const size_t count = std::min(kGroup, batch.pieces() - begin);
      for (size_t i = 0; i < count; ++i) {
        const size_t size = starts[i + 1] - starts[i], kept = std::min(size, kShortKey);
        ShortKey key;
        std::memcpy(&key, base + starts[i], sizeof key);
        key.low &= kKeep[kept].low;
        key.high = (key.high & kKeep[kept].high) | uint64_t{size} << 56;
        keys[i] = key;
        sets[i] = set_of(key);
        __builtin_prefetch(sets[i]);
      }
      for (size_t i = 0; i < count; ++i) {
        const size_t size = starts[i + 1] - starts[i];
        if (size <= kShortKey) [[likely]] {
          out = encode_short(vocabulary, keys[i], *sets[i], base + starts[i], out);
        } else {
          out = encode_long(vocabulary, base + starts[i], size, out);
        }
      }
    }
    return out;
  }

 private:
  struct Set;
  static constexpr int kSetBits = 17;
  static constexpr size_t kSets = size_t{1} << kSetBits;
  static constexpr uint32_t kInPlace = 3;
  struct Way {
    ShortKey key;
    uint32_t ids[kInPlace];  // or, where there are more, two halves of their place in more_
    uint32_t count;
  };
  struct Set {
    Way ways[2];
  };

  Set* set_of(ShortKey key) const { return sets_ + (hash_of(key) >> (64 - kSetBits)); }

  uint32_t* encode_short(const Vocabulary& vocabulary, ShortKey key, Set& set, const uint8_t* piece,
                         uint32_t* out) {
    const bool first = set.ways[0].key == key, second = set.ways[1].key == key;
    if (first | second) [[likely]] {
      const Way& way = set.ways[first ? 0 : 1];
      std::memcpy(out, way.ids, sizeof way.ids + sizeof way.count);
      if (way.count <= kInPlace) [[likely]]
        return out + way.count;
      if (const uint32_t* ids = more_.find(way.ids[0] | uint64_t{way.ids[1]} << 32)) {
        std::memcpy(out, ids, way.count * sizeof(uint32_t));
        return out + way.count;
      }
    }
    return miss(vocabulary, key, piece, set, out);
  }

  [[gnu::noinline]] uint32_t* miss(const Vocabulary& vocabulary, ShortKey key, const uint8_t* piece,
                                   Set& set, uint32_t* out) {
    const size_t size = key.high >> 56;
    uint32_t ids[kShortKey] = {vocabulary.whole(piece, size)};
    uint32_t count = 1;
    if (ids[0] == Vocabulary::kNoToken) {
      count = static_cast<uint32_t>(vocabulary.merge(piece, size, ids));
    }
    std::memcpy(out, ids, count * sizeof(uint32_t));
    Way way{key, {ids[0], ids[1], ids[2]}, count};
    if (count > kInPlace) {
      const uint64_t place = more_.add(ids, count);
      way.ids[0] = static_cast<uint32_t>(place);
      way.ids[1] = static_cast<uint32_t>(place >> 32);
    }
    set.ways[1] = set.ways[0];
    set.ways[0] = way;
    return out + count;
  }

  uint32_t* encode_long(const Vocabulary& vocabulary, const uint8_t* piece, size_t size,
                        uint32_t* out) {
    if (size > kLongKey) return encode_cut(vocabulary, piece, size, out);
    const uint64_t hash = hash_bytes(piece, size);
    LongEntry& entry = long_[hash >> (64 - kLongBits)];
    if (entry.hash == hash && entry.size == size) {
      const uint8_t* const bytes = long_bytes_.find(entry.bytes);
      const uint32_t* const ids = long_ids_.find(entry.ids);
      if (bytes && ids && std::memcmp(bytes, piece, size) == 0) {
        std::memcpy(out, ids, entry.count * sizeof(uint32_t));
        return out + entry.count;
      }
    }
    uint32_t* const end = encode_cut(vocabulary, piece, size, out);
    const auto count = static_cast<uint32_t>(end - out);
    entry = {hash, long_bytes_.add(piece, size), long_ids_.add(out, count),
             static_cast<uint32_t>(size), count};
    return end;
  }

  // A long piece is cut where no token can lie across: its parts are short, come again and again,
  // and merge on their own.
  uint32_t* encode_cut(const Vocabulary& vocabulary, const uint8_t* piece, size_t size,
                       uint32_t* out) {
    const uint32_t id = vocabulary.whole(piece, size);
    if (id != Vocabulary::kNoToken) {
      *out = id;
      return out + 1;
    }
    size_t begin = 0;
    const auto part = [&](size_t end) {
      const size_t length = end - begin;
      out = length <= kShortKey ? encode(vocabulary, piece + begin, length, out)
                                : out + vocabulary.merge(piece + begin, length, out);
      begin = end;
    };
    if (vocabulary.cuts_pieces()) {
      for (size_t p = 2; p + 1 < size; ++p) {
        if (piece[p] >= 0xC0 && vocabulary.cuts_before(piece + p)) part(p);
      }
    }
    part(size);
    return out;
  }

  // Pieces of 16 to kLongKey bytes, by hash.
  static constexpr size_t kLongKey = 64;
  static constexpr int kLongBits = 14;
  struct LongEntry {
    uint64_t hash, bytes, ids;
    uint32_t size, count;
  };
  std::vector<LongEntry> long_ = std::vector<LongEntry>(size_t{1} << kLongBits);
  Ring<uint8_t, 18> long_bytes_;
  Ring<uint32_t, 16> long_ids_;

  uint8_t* storage_;
  Set* sets_;
  Ring<uint32_t, 18> more_;  // ids of pieces that have more than kInPlace
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
