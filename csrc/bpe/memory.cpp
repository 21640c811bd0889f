#include "bpe/memory.h"

#include <cstdlib>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace pygpt {

#ifdef __linux__

void advise_huge(void* data, size_t size) {
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + 4095) & ~uintptr_t{4095};
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + size) & ~uintptr_t{4095};
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}

ZeroedPages::ZeroedPages(size_t size) {
  mapped_ = size + kHugePage;
  mapping_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapping_ == MAP_FAILED) throw std::bad_alloc();
  data_ = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(mapping_) + kHugePage - 1) &
                                     ~(kHugePage - 1));
  advise_huge(data_, size);
}

ZeroedPages::~ZeroedPages() { munmap(mapping_, mapped_); }

#else

void advise_huge(void*, size_t) {}

ZeroedPages::ZeroedPages(size_t size) : mapped_(size), mapping_(std::calloc(size + 64, 1)) {
  if (!mapping_) throw std::bad_alloc();
  data_ = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(mapping_) + 63) & ~uintptr_t{63});
}

ZeroedPages::~ZeroedPages() { std::free(mapping_); }

#endif

}  // namespace pygpt
