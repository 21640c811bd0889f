#include "bpe/memory.h"

#include <cstdint>
#include <cstdlib>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace pygpt {
namespace {

constexpr size_t kHuge = size_t{2} << 20;

}  // namespace

void advise_huge(void* data, size_t size) {
#ifdef __linux__
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + 4095) & ~uintptr_t{4095};
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + size) & ~uintptr_t{4095};
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data;
  (void)size;
#endif
}

void* allocate_huge(size_t size) {
  const size_t whole = (size + kHuge - 1) & ~(kHuge - 1);
  void* const data = std::aligned_alloc(kHuge, whole);
  if (!data) throw std::bad_alloc();
  advise_huge(data, whole);
  return data;
}

}  // namespace pygpt
