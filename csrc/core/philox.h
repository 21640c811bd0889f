// The random words of attention dropout, the same on every device: Philox4x32 with ten rounds
// (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011), keyed by the seed and
// counted by (key / 4, query, head, batch). Word key % 4 decides about that key: dropped when it is
// below dropout_threshold(p). So every weight has its own word, and backward finds it again in any
// order.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define PYGPT_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define PYGPT_HOST_DEVICE inline
#endif

namespace pygpt {

struct Philox {
  uint32_t words[4];
};

PYGPT_HOST_DEVICE Philox philox(uint64_t seed, uint32_t batch, uint32_t head, uint32_t query,
                                uint32_t key_group) {
  uint32_t c0 = key_group, c1 = query, c2 = head, c3 = batch;
  auto k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = static_cast<uint64_t>(0xD2511F53u) * c0;
    const uint64_t b = static_cast<uint64_t>(0xCD9E8D57u) * c2;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(b);
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(a);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

PYGPT_HOST_DEVICE uint32_t dropout_threshold(double p) {
  return static_cast<uint32_t>(p * 4294967296.0);
}

}  // namespace pygpt
