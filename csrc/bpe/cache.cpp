#include "bpe/cache.h"

#include <algorithm>
#include <cstring>
#include <new>

#include "bpe/memory.h"

namespace pygpt {
namespace {

// No branch: which of a set's two ways holds a piece cannot be foretold.
inline bool differ(ShortKey a, ShortKey b) { return ((a.low ^ b.low) | (a.high ^ b.high)) != 0; }

}  // namespace

PieceCache::PieceCache(const Vocabulary& vocabulary)
    : vocabulary_(vocabulary),
      id_bytes_(vocabulary.size() <= 1 << 16 ? 2 : 3),
      id_mask_((1u << 8 * id_bytes_) - 1),
      tables_(
          static_cast<uint8_t*>(allocate_huge(kWays * sizeof(Way) + kIndex * sizeof(uint32_t)))),
      log_(static_cast<uint8_t*>(std::malloc(kLog))) {
  if (!log_) throw std::bad_alloc();
  ways_ = reinterpret_cast<Way*>(tables_.get());
  index_ = reinterpret_cast<uint32_t*>(ways_ + kWays);
  clear();
}

void PieceCache::clear() {
  std::memset(tables_.get(), 0, kWays * sizeof(Way) + kIndex * sizeof(uint32_t));
  records_ = refused_ = 0;
  log_end_ = 1;
}

// Waiting for memory is what costs most: the keys of a group are made first, and their places
// fetched ahead.
uint32_t* PieceCache::encode(const PieceScanner& batch, uint32_t* out) {
  ShortKey keys[kGroup];
  const Way* sets[kGroup];
  const uint8_t* const base = batch.base();
  bool many = true;  // pieces were missing in the group before
  for (size_t begin = 0; begin < batch.pieces(); begin += kGroup) {
    const uint32_t* const starts = batch.starts() + begin;
    const size_t count = std::min(kGroup, batch.pieces() - begin);
    for (size_t i = 0; i < count; ++i) {
      keys[i] = key_at(base + starts[i], starts[i + 1] - starts[i]);
      sets[i] = set_of(hash_of(keys[i]));
      __builtin_prefetch(sets[i]);
    }
    size_t missing = 0;
    for (size_t i = 0; i < count; ++i) {
      const Way* const way = sets[i] + differ(sets[i]->key, keys[i]);
      std::memcpy(out, way->ids, sizeof way->ids + sizeof way->count);
      if (differ(way->key, keys[i])) [[unlikely]] {
        if (!missing++ & many) fetch_missing(base, starts + i, keys + i, count - i);
        out = encode(base + starts[i], starts[i + 1] - starts[i], keys[i], out);
      } else if (way->count > kInPlace) {
        out = emit(*way, out);
      } else {
        out += way->count;
      }
    }
    many = missing > 2;
  }
  return out;
}

// Fetches ahead what those of the pieces will need that do not stand in their sets.
void PieceCache::fetch_missing(const uint8_t* base, const uint32_t* starts, const ShortKey* keys,
                               size_t count) const {
  for (size_t i = 0; i < count; ++i) {
    uint64_t hash = hash_of(keys[i]);
    const Way* const set = set_of(hash);
    if (!(differ(set[0].key, keys[i]) & differ(set[1].key, keys[i]))) continue;
    const size_t size = starts[i + 1] - starts[i];
    if (size > kShortKey) hash = hash_bytes(base + starts[i], size);
    vocabulary_.prefetch(hash);
    __builtin_prefetch(slot_of(hash));
  }
}

uint32_t* PieceCache::encode(const uint8_t* piece, size_t size, uint32_t* out) {
  return encode(piece, size, size <= kShortKey ? short_key(piece, size) : ShortKey{}, out);
}

uint32_t* PieceCache::encode(const uint8_t* piece, size_t size, ShortKey key, uint32_t* out) {
  const uint64_t hash = size <= kShortKey ? hash_of(key) : hash_bytes(piece, size);
  if (size <= kShortKey) {
    const Way* const set = set_of(hash);
    const Way* const way = set + differ(set->key, key);
    if (!differ(way->key, key)) return emit(*way, out);
  }
  return resolve(piece, size, key, hash, out);
}

uint32_t* PieceCache::emit(const Way& way, uint32_t* out) const {
  std::memcpy(out, way.ids, sizeof way.ids + sizeof way.count);
  if (way.count <= kInPlace) return out + way.count;
  for (size_t i = 0, place = way.ids[0]; i < way.count; ++i, place += id_bytes_) {
    out[i] = id_at(place);
  }
  return out + way.count;
}

// A piece that does not stand in its set.
uint32_t* PieceCache::resolve(const uint8_t* piece, size_t size, ShortKey key, uint64_t hash,
                              uint32_t* out) {
  Way way{key, {vocabulary_.whole(piece, size, hash)}, 1};
  uint32_t* end = out + 1;
  if (way.ids[0] != Vocabulary::kNoToken) {
    *out = way.ids[0];
  } else if (size > kLongest) {
    return encode_cut(piece, size, out);
  } else {
    uint32_t record = find_record(piece, size, hash);
    if (record) {
      way.count = log_[record + 1];
      for (size_t i = 0; i < kInPlace; ++i) way.ids[i] = id_at(record + 2 + size + i * id_bytes_);
    } else {
      end = size > kShortKey ? encode_cut(piece, size, out)
                             : out + vocabulary_.merge(piece, size, out);
      way.count = static_cast<uint32_t>(end - out);
      std::memcpy(way.ids, out, sizeof way.ids);
      record = add_record(piece, size, hash, out, way.count);
      if (!record && way.count > kInPlace) return end;
    }
    if (way.count > kInPlace) way.ids[0] = static_cast<uint32_t>(record + 2 + size);
    end = emit(way, out);
  }
  if (size <= kShortKey) remember(way, hash);
  return end;
}

void PieceCache::remember(const Way& way, uint64_t hash) {
  Way* const set = set_of(hash);
  if (set[0].key == way.key) return;
  set[1] = set[0];
  set[0] = way;
}

// A long piece is cut where no token can lie across: its parts are short, come again and again,
// and merge on their own.
uint32_t* PieceCache::encode_cut(const uint8_t* piece, size_t size, uint32_t* out) {
  size_t begin = 0;
  const auto part = [&](size_t end) {
    const size_t length = end - begin;
    out = length <= kShortKey ? encode(piece + begin, length, out)
                              : out + vocabulary_.merge(piece + begin, length, out);
    begin = end;
  };
  if (vocabulary_.cuts_pieces()) {
    for (size_t p = 2; p + 1 < size; ++p) {
      if (piece[p] >= 0xC0 && vocabulary_.cuts_before(piece + p)) part(p);
    }
  }
  part(size);
  return out;
}

uint32_t PieceCache::find_record(const uint8_t* piece, size_t size, uint64_t hash) const {
  const uint32_t tag = tag_of(hash);
  for (const uint32_t* slot = slot_of(hash); *slot;
       slot = slot + 1 == index_ + kIndex ? index_ : slot + 1) {
    if ((*slot ^ tag) >> kPlaceBits) continue;
    const uint32_t record = *slot & ((1u << kPlaceBits) - 1);
    if (log_[record] == size && std::memcmp(&log_[record + 2], piece, size) == 0) return record;
  }
  return 0;
}

uint32_t PieceCache::add_record(const uint8_t* piece, size_t size, uint64_t hash,
                                const uint32_t* ids, size_t count) {
  if (log_end_ + kRecord > kLog || records_ > kIndex / 5 * 4) {
    // What is known goes on serving until as much again was turned away: a text a little larger
    // than the log would find nothing in one that always starts anew.
    if (++refused_ > records_) clear();
    return 0;
  }
  const auto record = static_cast<uint32_t>(log_end_);
  uint8_t* to = &log_[record];
  *to++ = static_cast<uint8_t>(size);
  *to++ = static_cast<uint8_t>(count);
  std::memcpy(to, piece, size);
  to += size;
  for (size_t i = 0; i < count; ++i, to += id_bytes_) std::memcpy(to, &ids[i], sizeof ids[i]);
  log_end_ = to - log_.get();
  uint32_t* slot = slot_of(hash);
  while (*slot) slot = slot + 1 == index_ + kIndex ? index_ : slot + 1;
  *slot = tag_of(hash) | record;
  ++records_;
  return record;
}

}  // namespace pygpt
