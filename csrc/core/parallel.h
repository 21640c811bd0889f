// The door to torch's own thread pool. pygpt/ops/native.py hands over the addresses of torch's C
// functions once; before that (and in plain C++ builds) everything runs on the calling thread.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>

namespace pygpt {

using TorchParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain,
                                     void (*body)(int64_t, int64_t, void*), void* context);
using TorchGetNumThreads = int32_t (*)(uint32_t*);

void set_torch_threads(TorchParallelFor parallel_for, TorchGetNumThreads get_num_threads);

// Number of workers that a parallel region may use now (torch.get_num_threads(), or 1).
int num_threads();

// Calls body(worker) once on each of at most `workers` threads, worker in [0, workers), and returns
// when all have returned. Fewer threads may come than were asked for: share work through a ticket.
// The first exception thrown by any body is rethrown here.
void run_workers(int workers, void (*body)(int worker, void* context), void* context);

// Runs body(task, worker) for every task in [0, tasks); tasks are handed out in order, one at a
// time.
template <class Body>
void parallel_tasks(int64_t tasks, const Body& body) {
  struct Context {
    const Body* body;
    int64_t tasks;
    std::atomic<int64_t> next{0};
  } context{&body, tasks};
  const int64_t threads = num_threads();
  const int workers = static_cast<int>(tasks < threads ? tasks : threads);
  run_workers(
      workers,
      [](int worker, void* opaque) {
        auto* c = static_cast<Context*>(opaque);
        for (int64_t task; (task = c->next.fetch_add(1, std::memory_order_relaxed)) < c->tasks;) {
          (*c->body)(task, worker);
        }
      },
      &context);
}

}  // namespace pygpt
