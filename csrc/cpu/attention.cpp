#include "cpu/attention.h"

#include "core/philox.h"

namespace pygpt::PYGPT_ISA_NAMESPACE {

Call describe(const AttentionArgs& a) {
  const bool pairs = kHasPairs && a.dtype == DType::kBFloat16;
  const int64_t words = pairs ? a.dim / 2 : a.dim, few_step = a.queries > 4 ? 32 : 16;
  return {.a = a,
          .element = a.dtype == DType::kFloat32 ? 4 : 2,
          .group = a.heads / a.kv_heads,
          .pitch = round_up(a.dim, kLanes),
          .words = words,
          .word_pitch = round_up(words, kLanes),
          .score_step = pairs || a.queries > 8 ? 128 : few_step,
          .factor = a.scale * 1.44269504088896341f,  // log2(e)
          .pairs = pairs,
          .lo = nullptr,
          .hi = nullptr,
          .mask_stride = 0};
}

// Fills lo and hi of one sequence. Query i stands at position `length - queries + i` of its keys.
static void find_visible(const AttentionArgs& a, int64_t b, int32_t* lo, int32_t* hi) {
  const int64_t length = a.kv_lengths ? min(max(a.kv_lengths[b], 0), a.keys) : a.keys;
  const int32_t* document = a.document_ids ? a.document_ids + b * a.keys : nullptr;
  int64_t start = -1;  // of the document that holds the position
  for (int64_t i = 0; i < a.queries; ++i) {
    const int64_t position = length - a.queries + i;
    hi[i] = static_cast<int32_t>(max(position + 1, 0));
    lo[i] = static_cast<int32_t>(a.window > 0 ? max(position + 1 - a.window, 0) : 0);
    if (!document || position < 0) continue;
    if (start < 0) {
      start = position;
      while (start > 0 && document[start - 1] == document[position]) --start;
    } else if (document[position] != document[position - 1]) {
      start = position;
    }
    lo[i] = static_cast<int32_t>(max(lo[i], start));
  }
}

size_t lay_out_masks(const AttentionArgs& a, char* base, Call& call) {
  Parts parts{base};
  const bool per_sequence = a.kv_lengths || a.document_ids;
  const int64_t rows = (per_sequence ? a.batch : 1) * a.queries;
  int32_t* lo = parts.take<int32_t>(rows);
  int32_t* hi = parts.take<int32_t>(rows);
  call.lo = lo;
  call.hi = hi;
  call.mask_stride = per_sequence ? a.queries : 0;
  if (base) {
    for (int64_t b = 0; b < rows / a.queries; ++b) {
      find_visible(a, b, lo + b * a.queries, hi + b * a.queries);
    }
  }
  return parts.used;
}

int64_t visible_pairs(const Call& call) {
  const int64_t distinct = call.mask_stride ? call.a.batch : 1;
  int64_t pairs = 0;
  for (int64_t i = 0; i < distinct * call.a.queries; ++i) pairs += max(call.hi[i] - call.lo[i], 0);
  return pairs * call.a.batch / distinct * call.a.heads;
}

void find_dropped(const Call& call, int64_t b, int64_t head, int64_t query, int64_t first_key,
                  int64_t keys, uint64_t* dropped) {
  const auto word = [](uint64_t x) { return broadcast(static_cast<int32_t>(x)); };
  const uint32_t threshold = dropout_threshold(call.a.dropout_p);
  const I32 sign = word(0x80000000u), limit = word(threshold ^ 0x80000000u);  // unsigned order
  std::memset(dropped, 0, (keys + 63) / 64 * 8);
  for (int64_t done = 0; done < keys; done += 4 * kLanes) {
    I32 c[4] = {lane_numbers() + word((first_key + done) / 4), word(query), word(head), word(b)};
    uint32_t k0 = static_cast<uint32_t>(call.a.seed), k1 = static_cast<uint32_t>(call.a.seed >> 32);
    for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
      I32 low0, high0, low2, high2;
      multiply_wide(c[0], word(0xD2511F53u), low0, high0);
      multiply_wide(c[2], word(0xCD9E8D57u), low2, high2);
      c[0] = high2 ^ c[1] ^ word(k0);
      c[1] = low2;
      c[2] = high0 ^ c[3] ^ word(k1);
      c[3] = low0;
    }
    uint64_t bit = 0;
    for (int w = 0; w < 4; ++w) {
      const uint32_t below = bits((c[w] ^ sign) < limit);
#if defined(__BMI2__)
      bit |= _pdep_u64(below, 0x1111111111111111u << w);
#else
      for (int i = 0; i < kLanes; ++i) bit |= static_cast<uint64_t>(below >> i & 1) << (4 * i + w);
#endif
    }
    dropped[done / 64] |= bit << (done % 64);
  }
}
}  // namespace pygpt::PYGPT_ISA_NAMESPACE
