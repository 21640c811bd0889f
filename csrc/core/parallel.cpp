#include "core/parallel.h"

#include <stdexcept>

namespace pygpt {
namespace {

TorchParallelFor torch_parallel_for = nullptr;
TorchGetNumThreads torch_get_num_threads = nullptr;

struct Region {
  void (*body)(int, void*);
  void* context;
  std::mutex mutex;
  std::exception_ptr error;
};

void run_range(int64_t begin, int64_t end, void* opaque) {
  auto* region = static_cast<Region*>(opaque);
  for (int64_t i = begin; i < end; ++i) {
    try {
      region->body(static_cast<int>(i), region->context);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(region->mutex);
      if (!region->error) region->error = std::current_exception();
    }
  }
}

}  // namespace

void set_torch_threads(TorchParallelFor parallel_for, TorchGetNumThreads get_num_threads) {
  torch_parallel_for = parallel_for;
  torch_get_num_threads = get_num_threads;
}

int num_threads() {
  uint32_t threads = 1;
  if (!torch_get_num_threads || torch_get_num_threads(&threads) != 0) return 1;
  return static_cast<int>(threads);
}

void run_workers(int workers, void (*body)(int, void*), void* context) {
  if (workers <= 0) return;
  Region region{body, context, {}, {}};
  if (workers == 1 || !torch_parallel_for) {
    run_range(0, workers, &region);
  } else if (torch_parallel_for(0, workers, 1, run_range, &region) != 0) {
    throw std::runtime_error("torch_parallel_for failed; set torch.set_num_threads(1) to go on");
  }
  if (region.error) std::rethrow_exception(region.error);
}

}  // namespace pygpt
