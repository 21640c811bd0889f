#include "core/blocks.h"

#include <sys/mman.h>
#include <unistd.h>

#include <iterator>
#include <map>
#include <mutex>
#include <unordered_map>

namespace pygpt {
namespace {

constexpr size_t kPage = 4096, kLine = 64;

// One range of addresses, reserved without memory behind it. Freed ranges are merged with their
// neighbours; a block goes to the smallest that holds it, the lowest of equal ones.
class Range {
 public:
  void* take(size_t bytes) {
    const std::lock_guard lock(mutex_);
    // Tensors that all begin at the same place of a page share few of a cache's sets: 5 % of a
    // step.
    const size_t offset = kLine * (1 + next_++ * 13 % 61);
    bytes = (bytes + offset + kPage - 1) / kPage * kPage;
    if (!base_ && !reserve()) return nullptr;
    auto best = free_.end();
    for (auto it = free_.begin(); it != free_.end(); ++it) {
      if (it->second >= bytes && (best == free_.end() || it->second < best->second)) best = it;
    }
    if (best == free_.end()) return nullptr;
    const auto [start, size] = *best;
    free_.erase(best);
    if (size > bytes) free_.emplace(start + bytes, size - bytes);
    taken_.emplace(start, bytes);
    return base_ + start + offset;
  }

  void give(void* block) {
    const std::lock_guard lock(mutex_);
    const auto taken =
        taken_.find(static_cast<size_t>(static_cast<char*>(block) - base_) / kPage * kPage);
    auto [start, size] = *taken;
    taken_.erase(taken);
    auto after = free_.lower_bound(start);
    if (after != free_.end() && after->first == start + size) {
      size += after->second;
      after = free_.erase(after);
    }
    if (after != free_.begin()) {
      const auto before = std::prev(after);
      if (before->first + before->second == start) {
        before->second += size;
        return;
      }
    }
    free_.emplace(start, size);
  }

 private:
  bool reserve() {
    const size_t bytes = static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) * kPage;
    void* base = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED) return false;
#ifdef MADV_HUGEPAGE
    madvise(base, bytes, MADV_HUGEPAGE);
#endif
    base_ = static_cast<char*>(base);
    free_.emplace(0, bytes);
    return true;
  }

  std::mutex mutex_;
  char* base_ = nullptr;
  std::map<size_t, size_t> free_;             // offset -> bytes
  std::unordered_map<size_t, size_t> taken_;  // offset -> bytes
  size_t next_ = 0;
};

Range& range() {
  static Range* one = new Range;  // never destroyed: tensors may outlive every static object
  return *one;
}

}  // namespace

void* take_block(size_t bytes) { return range().take(bytes); }
void give_block(void* block) { range().give(block); }

}  // namespace pygpt
