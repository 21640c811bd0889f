// The door to torch's own thread pool. pygpt/ops/native.py hands over the addresses of torch's C
// functions once; before that (and in plain C++ builds) everything runs on the calling thread.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <vector>

namespace pygpt {

using TorchParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain,
                                     void (*body)(int64_t, int64_t, void*), void* context);
using TorchGetNumThreads = int32_t (*)(uint32_t*);

void set_torch_threads(TorchParallelFor parallel_for, TorchGetNumThreads get_num_threads);

// Number of workers that a parallel region may use now (torch.get_num_threads(), or 1).
int num_threads();

// Calls body(worker) once for every worker in [0, workers) and returns when all have returned. A
// worker is the same thread in every call, as far as there are threads; one thread may be several,
// one after the other. The first exception thrown by any body is rethrown here.
void run_workers(int workers, void (*body)(int worker, void* context), void* context);

// Runs body(task, worker) for every task in [0, tasks). A worker begins with its own share of
// neighbouring tasks, the same in every call of as many: what one call left in a core's caches the
// next finds there. Who has finished helps the others.
template <class Body>
void parallel_tasks(int64_t tasks, const Body& body) {
  struct alignas(64) Share {  // in cache lines of its own
    std::atomic<int64_t> next;
    int64_t end;
  };
  struct Context {
    const Body& body;
    std::vector<Share> shares;
  };
  const auto workers = std::min<int64_t>(tasks, num_threads());
  Context context{body, std::vector<Share>(workers)};
  for (int64_t w = 0; w < workers; ++w) {
    context.shares[w].next = w * tasks / workers;
    context.shares[w].end = (w + 1) * tasks / workers;
  }
  run_workers(
      static_cast<int>(workers),
      [](int worker, void* opaque) {
        auto& [body, shares] = *static_cast<Context*>(opaque);
        for (size_t i = 0; i < shares.size(); ++i) {
          Share& share = shares[(worker + i) % shares.size()];
          for (int64_t task;
               (task = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end;) {
            body(task, worker);
          }
        }
      },
      &context);
}

// The same on this thread alone where waking others would cost more. `multiply_adds` are such as
// wait for memory now and then.
template <class Body>
void run_tasks(int64_t tasks, int64_t multiply_adds, const Body& body) {
  if (multiply_adds < 100'000) {
    for (int64_t task = 0; task < tasks; ++task) body(task, 0);
  } else {
    parallel_tasks(tasks, body);
  }
}

}  // namespace pygpt
