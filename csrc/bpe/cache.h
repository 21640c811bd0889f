// What one thread remembers of the pieces that it met: at most 10 MB, and as little memory touched
// as can be, because waiting for memory is what encoding costs.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>

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
  // A piece of up to kShortKey bytes. Up to three ids are stored in place, so that a hit copies
  // four numbers without looking at how many count; more stand in the log.
  static constexpr uint32_t kInPlace = 3;
  struct Way {
    ShortKey key;
    uint32_t ids[kInPlace];  // ids[0]: where they stand in the log, when there are more
    uint32_t count;
  };
  static constexpr size_t kGroup = 32;
  static constexpr size_t kLongest = 255;  // bytes of a piece in the log

  static constexpr size_t kSets = 1 << 15;  // of two ways, a cache line each
  static constexpr size_t kWays = 2 * kSets;
  static constexpr size_t kIndex = 5
                                   << 16;  // open addressing: tag << kPlaceBits | place in the log
  static constexpr int kPlaceBits = 23;
  static constexpr size_t kLog = 6'500'000;
  static constexpr size_t kRecord = 2 + kLongest + 3 * kLongest + 4;  // at most

  Way* set_of(uint64_t hash) const { return ways_ + 2 * ((hash >> 32) * kSets >> 32); }
  uint32_t* slot_of(uint64_t hash) const { return index_ + ((hash & 0xFFFFFFFF) * kIndex >> 32); }
  static uint32_t tag_of(uint64_t hash) {
    return static_cast<uint32_t>(hash >> 32) >> kPlaceBits << kPlaceBits;
  }

  uint32_t* encode(const uint8_t* piece, size_t size, ShortKey key, uint32_t* out);
  void fetch_missing(const uint8_t* base, const uint32_t* starts, const ShortKey* keys,
                     size_t count) const;
  uint32_t* resolve(const uint8_t* piece, size_t size, ShortKey key, uint64_t hash, uint32_t* out);
  uint32_t* encode_cut(const uint8_t* piece, size_t size, uint32_t* out);
  uint32_t* emit(const Way& way, uint32_t* out) const;
  void remember(const Way& way, uint64_t hash);
  void clear();

  // A record: size and count in a byte each, the piece, its ids in id_bytes_ each.
  uint32_t find_record(const uint8_t* piece, size_t size, uint64_t hash) const;  // 0: none
  // 0: no room.
  uint32_t add_record(const uint8_t* piece, size_t size, uint64_t hash, const uint32_t* ids,
                      size_t count);
  uint32_t id_at(size_t place) const {
    uint32_t id;
    std::memcpy(&id, log_.get() + place, sizeof id);
    return id & id_mask_;
  }

  const Vocabulary& vocabulary_;
  const uint32_t id_bytes_, id_mask_;
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<uint8_t[], Free> tables_, log_;
  Way* ways_;
  uint32_t* index_;
  size_t records_ = 0, refused_ = 0, log_end_ = 1;
};

}  // namespace pygpt
