// Memory of the calling thread that lives between calls: kernels ask for their work space here, so
// that no call pays for fresh pages.
#pragma once

#include <cstddef>

namespace pygpt {

// At least `bytes` bytes aligned to 64; content undefined; valid until this thread asks again. What
// a call shares among its tasks comes from the first, what a task uses for itself from the second.
char* call_scratch(size_t bytes);
char* task_scratch(size_t bytes);

}  // namespace pygpt
