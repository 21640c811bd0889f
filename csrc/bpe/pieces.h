// The distinct pieces of a corpus and how often each occurs, within a budget of memory.
#pragma once

#include <array>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "bpe/split.h"
#include "bpe/vocabulary.h"

namespace pygpt {

class PieceCounts;

// Tables that became too large, on disk, in partitions by hash, so that equal pieces meet again.
// The files have no names: they are gone with the process, however it ends. Throws ResourceError.
class PieceSpill {
 public:
  static constexpr size_t kPartitions = 64;

  // Adds a table's pieces; one table at a time.
  void add(const PieceCounts& counts);
  bool empty() const { return !files_[0]; }
  // Adds a partition's pieces to a table.
  void read(size_t partition, PieceCounts* counts);

 private:
  struct Close {
    void operator()(std::FILE* file) const { std::fclose(file); }
  };
  std::array<std::unique_ptr<std::FILE, Close>, kPartitions> files_;
  std::string folder_;
  std::mutex mutex_;
};

class PieceCounts {
 public:
  // A table that would outgrow `budget` bytes goes to `spill`, where there is one.
  explicit PieceCounts(size_t budget = ~size_t{0}, PieceSpill* spill = nullptr);

  void add_text(Pattern pattern, std::string_view text);
  void add_piece(std::string_view piece, uint64_t count);
  void add_all(const PieceCounts& other);
  bool empty() const { return used_ == 0 && long_.empty(); }
  void clear();

  template <class Visit>
  void each(const Visit& visit) const {  // visit(piece, count)
    for (const Slot& slot : slots_) {
      if (slot.count) visit(view(slot), slot.count);
    }
    for (const auto& [piece, count] : long_) visit(std::string_view(piece), count);
  }

 private:
  struct alignas(32) Slot {
    ShortKey key;
    uint64_t count;
  };
  static std::string_view view(const Slot& slot) {
    return {reinterpret_cast<const char*>(&slot.key), slot.key.high >> 56};
  }
  void add_short(ShortKey key, uint64_t hash, uint64_t count) {  // after make_room()
    size_t i = slot(hash);
    while (slots_[i].count && slots_[i].key != key) i = (i + 1) & (slots_.size() - 1);
    used_ += slots_[i].count == 0;
    slots_[i].key = key;
    slots_[i].count += count;
  }
  size_t slot(uint64_t hash) const { return hash * order_ >> shift_; }
  void add_long(std::string_view piece, uint64_t count);
  void make_room(size_t pieces);  // short ones
  void grow();

  std::vector<Slot> slots_;  // open addressing
  size_t used_ = 0;
  int shift_ = 64;
  uint64_t order_;  // every table has its own: pieces that come in another's crowd nowhere
  std::unordered_map<std::string, uint64_t> long_;
  size_t long_bytes_ = 0;
  size_t budget_;
  PieceSpill* spill_;
};

}  // namespace pygpt
