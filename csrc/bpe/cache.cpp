#include "bpe/cache.h"

#include <algorithm>
#include <cstring>

namespace pygpt {
namespace {

// No branch: which of a set's two ways holds a piece cannot be foretold.
inline bool differ(ShortKey a, ShortKey b) { return ((a.low ^ b.low) | (a.high ^ b.high)) != 0; }

}  // namespace

PieceCache::PieceCache(const Vocabulary& vocabulary)
    : vocabulary_(vocabulary),
      id_bytes_(vocabulary.size() <= 1 << 16 ? 2 : 3),
      id_mask_((1u << 8 * id_bytes_) - 1),
      packed_(sizeof(Way::ids) / id_bytes_),
      memory_(kBytes),
      index_(reinterpret_cast<uint32_t*>(memory_.data())),
      ways_(reinterpret_cast<Way*>(index_ + kIndex)),
      log_(reinterpret_cast<uint8_t*>(ways_ + 2 * kFewSets)) {}

void PieceCache::make_room() {
  if (refused_ && sets_ == kManySets) {
    sets_ = kFewSets;
    for (size_t set = 0; set < sets_; ++set) {  // keeps the first of each two sets
      const Way first = ways_[4 * set], second = ways_[4 * set + 2];
      ways_[2 * set] = first.count ? first : second;
      ways_[2 * set + 1] = first.count ? second : Way{};
    }
    log_end_ = 1;
    log_limit_ = kGivenUp;
    refused_ = 0;
  } else if (refused_ > records_) {
    std::memset(memory_.data(), 0, log_ - memory_.data());
    log_end_ = 1;
    log_limit_ = kLog;
    records_ = refused_ = 0;
  }
}

// Waiting for memory is what costs most: the keys of a group are made, and their places fetched,
// while the group before is looked up.
uint32_t* PieceCache::encode(const PieceScanner& batch, uint32_t* out) {
  make_room();
  struct Group {
    ShortKey keys[kGroup];
    const Way* sets[kGroup];
  } groups[2];
  const uint8_t* const base = batch.base();
  const auto prepare = [&](size_t begin, Group& group) {
    const uint32_t* const starts = batch.starts() + begin;
    const size_t count = std::min(kGroup, batch.pieces() - begin);
    for (size_t i = 0; i < count; ++i) {
      const size_t size = starts[i + 1] - starts[i];
      group.keys[i] = key_at(base + starts[i], size);
      if (size > kShortKey) [[unlikely]]
        group.keys[i] = long_key(base + starts[i], size);
      group.sets[i] = set_of(hash_of(group.keys[i]));
      __builtin_prefetch(group.sets[i]);
    }
  };
  bool many = true;  // pieces were missing in the group before
  if (batch.pieces()) prepare(0, groups[0]);
  for (size_t begin = 0, g = 0; begin < batch.pieces(); begin += kGroup, g ^= 1) {
    if (begin + kGroup < batch.pieces()) prepare(begin + kGroup, groups[g ^ 1]);
    const uint32_t* const starts = batch.starts() + begin;
    const size_t count = std::min(kGroup, batch.pieces() - begin);
    const ShortKey* const keys = groups[g].keys;
    const Way* const* const sets = groups[g].sets;
    size_t missing = 0;
    for (size_t i = 0; i < count; ++i) {
      const Way* const way = sets[i] + differ(sets[i]->key, keys[i]);
      std::memcpy(out, way->ids, 16);
      if (differ(way->key, keys[i])) [[unlikely]] {
        if (!missing++ & many) fetch_missing(keys + i, count - i);
        out = resolve(base + starts[i], starts[i + 1] - starts[i], keys[i], out);
      } else if (way->count > kPlain) {
        out = emit_more(base + starts[i], starts[i + 1] - starts[i], *way, out);
      } else {
        out += way->count;
      }
    }
    many = missing > 2;
  }
  return out;
}

// Fetches ahead what those of the pieces will need that do not stand in their sets.
void PieceCache::fetch_missing(const ShortKey* keys, size_t count) const {
  for (size_t i = 0; i < count; ++i) {
    const uint64_t hash = hash_of(keys[i]);
    const Way* const set = set_of(hash);
    if (!(differ(set[0].key, keys[i]) & differ(set[1].key, keys[i]))) continue;
    vocabulary_.prefetch(hash);
    __builtin_prefetch(slot_of(hash));
  }
}

uint32_t* PieceCache::encode(const uint8_t* piece, size_t size, uint32_t* out) {
  make_room();
  return encode_one(piece, size, out);
}

uint32_t* PieceCache::encode_one(const uint8_t* piece, size_t size, uint32_t* out) {
  const ShortKey key = key_of(piece, size);
  const Way* const set = set_of(hash_of(key));
  const Way* const way = set + differ(set->key, key);
  if (differ(way->key, key)) return resolve(piece, size, key, out);
  if (way->count > kPlain) return emit_more(piece, size, *way, out);
  std::memcpy(out, way->ids, 16);
  return out + way->count;
}

// Four at a time: how many cannot be foretold.
uint32_t* PieceCache::unpack(const uint8_t* ids, size_t count, uint32_t* out) const {
  uint32_t* const end = out + count;
  do {
    for (int i = 0; i < 4; ++i, ids += id_bytes_) {
      uint32_t id;
      std::memcpy(&id, ids, sizeof id);
      *out++ = id & id_mask_;
    }
  } while (out < end);
  return end;
}

uint32_t* PieceCache::emit_more(const uint8_t* piece, size_t size, const Way& way, uint32_t* out) {
  if (way.count != kLogged) return unpack(way.ids, way.count, out);
  uint32_t record;
  std::memcpy(&record, way.ids, sizeof record);
  return emit_record(piece, size, way.key, record, out);
}

uint32_t* PieceCache::emit_record(const uint8_t* piece, size_t size, ShortKey key, uint32_t record,
                                  uint32_t* out) {
  if (size > kShortKey && std::memcmp(&log_[record + 2], piece, size) != 0) {
    return resolve(piece, size, key, out);  // another piece of the same hash
  }
  return unpack(&log_[record + 2 + size], log_[record + 1], out);
}

// A piece that does not stand in its set.
uint32_t* PieceCache::resolve(const uint8_t* piece, size_t size, ShortKey key, uint32_t* out) {
  const uint64_t hash = hash_of(key);
  const uint32_t token = vocabulary_.whole(piece, size, hash);
  uint32_t* end = out + 1;
  *out = token;
  if (size <= kShortKey && token != Vocabulary::kNoToken) {
    remember(key, out, 1);
    return end;
  }
  if (size > kLongest) return token != Vocabulary::kNoToken ? end : encode_cut(piece, size, out);
  uint32_t record = find_record(piece, size, hash);
  if (record) {
    end = emit_record(piece, size, key, record, out);
  } else {
    if (token == Vocabulary::kNoToken) {
      end = size <= kShortKey ? out + vocabulary_.merge(piece, size, out)
                              : encode_cut(piece, size, out);
    }
    record = add_record(piece, size, hash, out, end - out);
  }
  const size_t count = end - out;
  if (size <= kShortKey && count <= packed_) {
    remember(key, out, count);
  } else if (record) {
    Way way{key, {}, kLogged};
    std::memcpy(way.ids, &record, sizeof record);
    remember(way);
  }
  return end;
}

void PieceCache::remember(ShortKey key, const uint32_t* ids, size_t count) {
  Way way{key, {}, static_cast<uint8_t>(count)};
  if (count <= kPlain) {
    std::memcpy(way.ids, ids, kPlain * sizeof *ids);
  } else {
    for (size_t i = 0; i < packed_; ++i) std::memcpy(way.ids + i * id_bytes_, &ids[i], id_bytes_);
  }
  remember(way);
}

// The pieces that come first come most often: the first stays.
void PieceCache::remember(const Way& way) {
  Way* const set = set_of(hash_of(way.key));
  set[set[0].count != 0] = way;
}

// A long piece is cut where no token can lie across: its parts are short, come again and again,
// and merge on their own.
uint32_t* PieceCache::encode_cut(const uint8_t* piece, size_t size, uint32_t* out) {
  size_t begin = 0;
  const auto part = [&](size_t end) {
    const size_t length = end - begin;
    out = length <= kShortKey ? encode_one(piece + begin, length, out)
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
  if (log_end_ + kRecord > log_limit_ || records_ > kIndex / 5 * 4) {
    ++refused_;
    return 0;
  }
  const auto record = static_cast<uint32_t>(log_end_);
  uint8_t* to = &log_[record];
  *to++ = static_cast<uint8_t>(size);
  *to++ = static_cast<uint8_t>(count);
  std::memcpy(to, piece, size);
  to += size;
  for (size_t i = 0; i < count; ++i, to += id_bytes_) std::memcpy(to, &ids[i], sizeof ids[i]);
  log_end_ = to - log_;
  uint32_t* slot = slot_of(hash);
  while (*slot) slot = slot + 1 == index_ + kIndex ? index_ : slot + 1;
  *slot = tag_of(hash) | record;
  ++records_;
  return record;
}

}  // namespace pygpt
