// Large arrays on huge pages, where the system has them: a page fault for two megabytes, not four
// kilobytes, and few misses of the address cache.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pygpt {

constexpr size_t kHugePage = size_t{2} << 20;

// Asks for huge pages within [data, data + size). Only a wish.
void advise_huge(void* data, size_t size);

// Zeros on huge pages; what is never written takes no memory.
class ZeroedPages {
 public:
  explicit ZeroedPages(size_t size);  // throws std::bad_alloc
  ~ZeroedPages();
  ZeroedPages(const ZeroedPages&) = delete;
  ZeroedPages& operator=(const ZeroedPages&) = delete;
  uint8_t* data() const { return data_; }

 private:
  size_t mapped_;
  void* mapping_;
  uint8_t* data_;
};

}  // namespace pygpt
