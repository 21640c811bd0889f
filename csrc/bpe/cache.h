// What one thread remembers of the pieces that it met: at most 10 MB, and as little memory touched
// as can be, because waiting for memory is what encoding costs.
#pragma once

#include <cstddef>
#include <cstdint>

#include "bpe/memory.h"
#include "bpe/scan.h"
#include "bpe/vocabulary.h"

namespace pygpt {

class PieceCache {
 public:
  explicit PieceCache(const Vocabulary& vocabulary);

  // Writes the ids of a piece at `out`, which has room for its bytes + 4; returns their end.
  uint32_t* encode(const uint8_t* piece, size_t size, uint32_t* out);
  // The same for all pieces of a batch.
  uint32_t* encode(const PieceScanner& batch, uint32_t* out);

 private:
  // A piece. Up to three ids stand in `ids` as they are, so that a hit copies 16 bytes without
  // looking at how many count; a few more in id_bytes_ each. Still more stand in the log, and so do
  // all of a piece longer than its key: there its bytes are compared.
  struct Way {
    ShortKey key;
    uint8_t ids[15];  // or the place of a record
    uint8_t count;    // or kLogged
  };
  static constexpr uint8_t kPlain = 3, kLogged = 255;
  static constexpr size_t kGroup = 32;
  static constexpr size_t kLongest = 255;  // bytes of a piece in the log

  // One stretch of memory: the index, the sets and the log. Where that does not suffice for a text
  // of many languages, half of the sets are given up and become log too.
  static constexpr size_t kBytes = 10'000'000;
  static constexpr size_t kIndex = 5
                                   << 16;  // open addressing: tag << kPlaceBits | place in the log
  static constexpr int kPlaceBits = 23;
  static constexpr size_t kManySets = 1 << 16, kFewSets = 1 << 15;
  static constexpr size_t kGivenUp = 2 * (kManySets - kFewSets) * sizeof(Way);
  static constexpr size_t kLog = kBytes - kIndex * sizeof(uint32_t) - 2 * kFewSets * sizeof(Way);
  static_assert(kLog < 1 << kPlaceBits);
  static constexpr size_t kRecord = 2 + kLongest + 3 * kLongest + 4;  // at most

  Way* set_of(uint64_t hash) const { return ways_ + 2 * ((hash >> 32) * sets_ >> 32); }
  uint32_t* slot_of(uint64_t hash) const { return index_ + ((hash & 0xFFFFFFFF) * kIndex >> 32); }
  static uint32_t tag_of(uint64_t hash) {
    return static_cast<uint32_t>(hash >> 32) >> kPlaceBits << kPlaceBits;
  }

  uint32_t* encode_one(const uint8_t* piece, size_t size, uint32_t* out);
  void fetch_missing(const ShortKey* keys, size_t count) const;
  uint32_t* resolve(const uint8_t* piece, size_t size, ShortKey key, uint32_t* out);
  uint32_t* encode_cut(const uint8_t* piece, size_t size, uint32_t* out);
  uint32_t* emit_more(const uint8_t* piece, size_t size, const Way& way, uint32_t* out);
  uint32_t* emit_record(const uint8_t* piece, size_t size, ShortKey key, uint32_t record,
                        uint32_t* out);
  void remember(ShortKey key, const uint32_t* ids, size_t count);
  void remember(const Way& way);
  // When records were turned away. Once half of the sets are given up, all is forgotten when as
  // many pieces were turned away as are known: till then these go on serving, as a text a little
  // larger than the log would find nothing in one that always starts anew.
  void make_room();

  // A record: size and count in a byte each, the piece, its ids in id_bytes_ each.
  uint32_t find_record(const uint8_t* piece, size_t size, uint64_t hash) const;  // 0: none
  // 0: no room.
  uint32_t add_record(const uint8_t* piece, size_t size, uint64_t hash, const uint32_t* ids,
                      size_t count);
  uint32_t* unpack(const uint8_t* ids, size_t count, uint32_t* out) const;

  const Vocabulary& vocabulary_;
  const uint32_t id_bytes_, id_mask_, packed_;  // packed_: ids that fit in a Way
  const ZeroedPages memory_;
  size_t sets_ = kManySets;
  uint32_t* const index_;
  Way* const ways_;     // two a set: a cache line
  uint8_t* const log_;  // at first it begins where the given up sets end
  size_t records_ = 0, refused_ = 0, log_end_ = kGivenUp, log_limit_ = kLog;
};

}  // namespace pygpt
