// Large arrays on huge pages, where the system has them: a page fault for two megabytes, not four
// kilobytes, and few misses of the address cache.
#pragma once

#include <cstddef>

namespace pygpt {

// Asks for huge pages within [data, data + size). Only a wish.
void advise_huge(void* data, size_t size);

// Memory that begins at a huge page, for std::free(). Throws std::bad_alloc.
void* allocate_huge(size_t size);

}  // namespace pygpt
