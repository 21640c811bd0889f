#include "core/scratch.h"

#include <new>

namespace pygpt {
namespace {

struct Block {
  void* data = nullptr;
  size_t size = 0;
  ~Block() { ::operator delete(data, std::align_val_t(64)); }
};

}  // namespace

void* scratch(size_t bytes) {
  thread_local Block block;
  if (block.size < bytes) {
    ::operator delete(block.data, std::align_val_t(64));
    block = {};
    block.data = ::operator new(bytes, std::align_val_t(64));
    block.size = bytes;
  }
  return block.data;
}

}  // namespace pygpt
