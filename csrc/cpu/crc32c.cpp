// CRC-32C (RFC 3720, appendix B.4). Three streams side by side hide the latency of the instruction,
// pieces run in parallel, and multiplication by x^(8 n) mod P joins what they found. So it costs
// about as much as reading the memory once; one stream takes three times as long.
#include <cstring>

#include "core/parallel.h"
#include "cpu/kernels.h"

#if defined(__SSE4_2__)
#include <nmmintrin.h>
#endif

namespace pygpt::PYGPT_ISA_NAMESPACE {
namespace {

constexpr uint32_t kPolynomial = 0x82F63B78;  // P, its highest power in the lowest bit
constexpr int64_t kPieces = 64, kLeastPiece = 1 << 20;

// a b mod P.
constexpr uint32_t multiply(uint32_t a, uint32_t b) {
  uint32_t product = 0;
  for (; a; a <<= 1) {
    if (a >> 31) product ^= b;
    b = (b >> 1) ^ (b & 1 ? kPolynomial : 0);
  }
  return product;
}

// x^(8 bytes) mod P: what a state is multiplied by when so many zero bytes follow.
constexpr uint32_t shift(int64_t bytes) {
  uint32_t result = 1u << 31, power = 1u << 23;
  for (; bytes; bytes >>= 1, power = multiply(power, power)) {
    if (bytes & 1) result = multiply(result, power);
  }
  return result;
}

#if defined(__SSE4_2__)

// Bytes of a stream; with a high power of two the three would meet in one set of the cache.
constexpr int64_t kStream = 32704;

uint64_t word(const uint8_t* at) {
  uint64_t value;
  std::memcpy(&value, at, 8);
  return value;
}

uint32_t update(uint32_t state, const uint8_t* at, int64_t size) {
  constexpr uint32_t kFirst = shift(2 * kStream), kSecond = shift(kStream);
  for (; size >= 3 * kStream; at += 3 * kStream, size -= 3 * kStream) {
    uint64_t a = state, b = 0, c = 0;
    for (const uint8_t* p = at; p < at + kStream; p += 8) {
      a = _mm_crc32_u64(a, word(p));
      b = _mm_crc32_u64(b, word(p + kStream));
      c = _mm_crc32_u64(c, word(p + 2 * kStream));
    }
    state = multiply(kFirst, static_cast<uint32_t>(a)) ^
            multiply(kSecond, static_cast<uint32_t>(b)) ^ static_cast<uint32_t>(c);
  }
  for (; size >= 8; at += 8, size -= 8) {
    state = static_cast<uint32_t>(_mm_crc32_u64(state, word(at)));
  }
  for (; size; ++at, --size) state = _mm_crc32_u8(state, *at);
  return state;
}

#else

// steps[n][byte]: what a byte adds when n more follow it.
struct Table {
  uint32_t steps[8][256] = {};
  constexpr Table() {
    for (uint32_t byte = 0; byte < 256; ++byte) {
      for (int n = 0; n < 8; ++n) steps[n][byte] = multiply(shift(n + 1), byte);
    }
  }
};
constexpr Table kTable;

uint32_t update(uint32_t state, const uint8_t* at, int64_t size) {
  for (; size >= 8; at += 8, size -= 8) {
    uint32_t next = 0;
    for (int i = 0; i < 8; ++i) {
      const uint32_t byte = at[i] ^ (i < 4 ? state >> 8 * i & 0xFF : 0);
      next ^= kTable.steps[7 - i][byte];
    }
    state = next;
  }
  for (; size; ++at, --size) state = state >> 8 ^ kTable.steps[0][(state ^ *at) & 0xFF];
  return state;
}

#endif

}  // namespace

uint32_t crc32c(const uint8_t* data, int64_t size) {
  const int64_t even = (size + kPieces - 1) / kPieces;
  const int64_t piece = even > kLeastPiece ? even : kLeastPiece;
  const int64_t pieces = (size + piece - 1) / piece;
  const auto length = [&](int64_t i) { return i + 1 < pieces ? piece : size - i * piece; };
  uint32_t found[kPieces];
  parallel_tasks(pieces, [&](int64_t i, int) {
    found[i] = update(i ? 0 : 0xFFFFFFFF, data + i * piece, length(i));
  });
  uint32_t state = pieces ? found[0] : 0xFFFFFFFF;
  for (int64_t i = 1; i < pieces; ++i) state = multiply(shift(length(i)), state) ^ found[i];
  return ~state;
}

}  // namespace pygpt::PYGPT_ISA_NAMESPACE
