#include "core/scratch.h"

#include <new>

namespace pygpt {
namespace {

constexpr std::align_val_t kLine{64};

class Block {
 public:
  ~Block() { ::operator delete(data_, kLine); }

  char* at_least(size_t bytes) {
    if (size_ < bytes) {
      ::operator delete(data_, kLine);
      data_ = nullptr, size_ = 0;
      data_ = ::operator new(bytes, kLine);
      size_ = bytes;
    }
    return static_cast<char*>(data_);
  }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace

char* call_scratch(size_t bytes) {
  thread_local Block block;
  return block.at_least(bytes);
}

char* task_scratch(size_t bytes) {
  thread_local Block block;
  return block.at_least(bytes);
}

}  // namespace pygpt
