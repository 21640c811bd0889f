#include "bpe/pieces.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cerrno>
#include <cstdlib>
#include <cstring>

#include "bpe/scan.h"
#include "core/error.h"

namespace pygpt {
namespace {

struct Record {
  uint64_t count, size;  // the piece follows
};

// Throws ResourceError, naming what errno says.
[[noreturn]] void fail(const std::string& folder) {
  throw ResourceError(folder + ": " + std::strerror(errno) +
                      " while counts of pieces were put there; set TMPDIR to a folder with more "
                      "room, or give a larger memory_budget");
}

// A file that has no name.
std::FILE* scratch_file(const std::string& folder) {
  std::string path = folder + "/pygpt-XXXXXX";
  const int descriptor = mkstemp(path.data());
  if (descriptor < 0) fail(folder);
  unlink(path.c_str());
  std::FILE* const file = fdopen(descriptor, "w+b");
  if (!file) {
    close(descriptor);
    fail(folder);
  }
  return file;
}

}  // namespace

void PieceSpill::add(const PieceCounts& counts) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (empty()) {
    const char* const folder = std::getenv("TMPDIR");
    folder_ = folder && *folder ? folder : "/tmp";
    for (auto& file : files_) file.reset(scratch_file(folder_));
  }
  counts.each([&](std::string_view piece, uint64_t count) {
    const auto* bytes = reinterpret_cast<const uint8_t*>(piece.data());
    std::FILE* const file = files_[hash_bytes(bytes, piece.size()) % kPartitions].get();
    const Record record{count, piece.size()};
    const bool written = std::fwrite(&record, sizeof record, 1, file) == 1 &&
                         std::fwrite(piece.data(), 1, piece.size(), file) == piece.size();
    if (!written) fail(folder_);
  });
}

void PieceSpill::read(size_t partition, PieceCounts* counts) {
  std::FILE* const file = files_[partition].get();
  if (std::fflush(file) != 0) fail(folder_);
  std::rewind(file);
  Record record;
  for (std::string piece; std::fread(&record, sizeof record, 1, file) == 1;) {
    piece.resize(record.size);
    if (std::fread(piece.data(), 1, piece.size(), file) != piece.size()) break;
    counts->add_piece(piece, record.count);
  }
  if (std::ferror(file)) fail(folder_);
}

PieceCounts::PieceCounts(size_t budget, PieceSpill* spill) : budget_(budget), spill_(spill) {
  static std::atomic<uint64_t> tables{0};
  order_ = ++tables * 0x9E3779B97F4A7C15u | 1;
}

void PieceCounts::add_text(Pattern pattern, std::string_view text) {
  const auto* begin = reinterpret_cast<const uint8_t*>(text.data());
  constexpr size_t kGroup = 32;  // keys made, and their places fetched, ahead of counting
  ShortKey keys[kGroup];
  uint64_t hashes[kGroup];
  for (PieceScanner pieces(pattern, begin, text.size()); pieces.next();) {
    for (size_t from = 0; from < pieces.pieces(); from += kGroup) {
      const uint32_t* const starts = pieces.starts() + from;
      const size_t count = std::min(kGroup, pieces.pieces() - from);
      make_room(count);
      for (size_t i = 0; i < count; ++i) {
        keys[i] = key_at(pieces.base() + starts[i], starts[i + 1] - starts[i]);
        hashes[i] = hash_of(keys[i]);
        __builtin_prefetch(&slots_[slot(hashes[i])]);
      }
      for (size_t i = 0; i < count; ++i) {
        const size_t size = starts[i + 1] - starts[i];
        if (size <= kShortKey) {
          add_short(keys[i], hashes[i], 1);
        } else {
          add_long({reinterpret_cast<const char*>(pieces.base()) + starts[i], size}, 1);
        }
      }
    }
  }
}

void PieceCounts::add_piece(std::string_view piece, uint64_t count) {
  if (piece.empty() || count == 0) return;
  if (piece.size() > kShortKey) {
    make_room(0);
    add_long(piece, count);
  } else {
    make_room(1);
    const auto key = short_key(reinterpret_cast<const uint8_t*>(piece.data()), piece.size());
    add_short(key, hash_of(key), count);
  }
}

void PieceCounts::add_long(std::string_view piece, uint64_t count) {
  uint64_t& total = long_[std::string(piece)];
  if (total == 0) long_bytes_ += piece.size() + 96;  // about what a node takes
  total += count;
}

void PieceCounts::add_all(const PieceCounts& other) {
  other.each([&](std::string_view piece, uint64_t count) { add_piece(piece, count); });
}

void PieceCounts::clear() {
  std::fill(slots_.begin(), slots_.end(), Slot{});
  used_ = 0;
  long_.clear();
  long_bytes_ = 0;
}

void PieceCounts::make_room(size_t pieces) {
  const bool full = (used_ + pieces) * 4 > slots_.size() * 3;
  if (spill_ && !empty()) {
    const size_t after = slots_.size() * sizeof(Slot) * (full ? 3 : 1);  // old and new, for a while
    if (after + long_bytes_ > budget_) {
      spill_->add(*this);
      clear();
    }
  }
  while ((used_ + pieces) * 4 > slots_.size() * 3) grow();
}

void PieceCounts::grow() {
  std::vector<Slot> old(std::max<size_t>(1 << 6, slots_.size() * 2));
  old.swap(slots_);
  shift_ = 64 - std::countr_zero(slots_.size());
  for (const Slot& slot : old) {
    if (!slot.count) continue;
    size_t i = this->slot(hash_of(slot.key));
    while (slots_[i].count) i = (i + 1) & (slots_.size() - 1);
    slots_[i] = slot;
  }
}

}  // namespace pygpt
