// Memory for the tensors of a training step, kept from step to step. malloc either gives large
// blocks back to the system, and fresh pages cost more than what is computed in them, or keeps them
// among small ones, which cut the holes that they leave into pieces of no use: a third of a step's
// memory. Here are large blocks only.
#pragma once

#include <cstddef>

namespace pygpt {

// A block of `bytes`, aligned to a cache line; null where the system refuses the addresses.
void* take_block(size_t bytes);
void give_block(void* block);

}  // namespace pygpt
