// Which of 64 bytes are letters, digits, blanks: the vectorised half of the tokenizer's splitter.
#include "cpu/kernels.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace pygpt::PYGPT_ISA_NAMESPACE {

#if defined(__AVX512BW__)

void byte_classes(const uint8_t* text, int64_t blocks, ByteClasses* out) {
  const auto in = [](__m512i bytes, char first, char count) {
    const __m512i from = _mm512_sub_epi8(bytes, _mm512_set1_epi8(first));
    return _mm512_cmplt_epu8_mask(from, _mm512_set1_epi8(count));
  };
  for (int64_t i = 0; i < blocks; ++i) {
    const __m512i bytes = _mm512_loadu_si512(text + 64 * i);
    const auto is = [&](char c) { return _mm512_cmpeq_epi8_mask(bytes, _mm512_set1_epi8(c)); };
    out[i].upper = in(bytes, 'A', 26);
    out[i].lower = in(bytes, 'a', 26);
    out[i].digit = in(bytes, '0', 10);
    out[i].space = is(' ');
    out[i].newline = is('\n') | is('\r');
    out[i].blank = out[i].space | in(bytes, '\t', 5);
    out[i].apostrophe = is('\'');
    out[i].high = _mm512_movepi8_mask(bytes);
    out[i].trailing = in(bytes, static_cast<char>(0x80), 64);
  }
}

#elif defined(__AVX2__)

void byte_classes(const uint8_t* text, int64_t blocks, ByteClasses* out) {
  for (int64_t i = 0; i < blocks; ++i) {
    out[i] = {};
    for (int half = 0; half < 2; ++half) {
      const __m256i bytes =
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(text + 64 * i + 32 * half));
      const auto mask = [&](__m256i v) {
        return static_cast<uint64_t>(static_cast<uint32_t>(_mm256_movemask_epi8(v))) << 32 * half;
      };
      const auto is = [&](char c) { return mask(_mm256_cmpeq_epi8(bytes, _mm256_set1_epi8(c))); };
      const auto in = [&](char first, char last) {  // bytes from 128 on are negative: never inside
        return mask(_mm256_andnot_si256(
            _mm256_cmpgt_epi8(bytes, _mm256_set1_epi8(last)),
            _mm256_cmpgt_epi8(bytes, _mm256_set1_epi8(static_cast<char>(first - 1)))));
      };
      out[i].upper |= in('A', 'Z');
      out[i].lower |= in('a', 'z');
      out[i].digit |= in('0', '9');
      out[i].space |= is(' ');
      out[i].newline |= is('\n') | is('\r');
      out[i].blank |= is(' ') | in('\t', '\r');
      out[i].apostrophe |= is('\'');
      out[i].high |= mask(bytes);
      out[i].trailing |= mask(_mm256_cmpgt_epi8(_mm256_set1_epi8(static_cast<char>(0xC0)), bytes));
    }
  }
}

#else

void byte_classes(const uint8_t* text, int64_t blocks, ByteClasses* out) {
  for (int64_t i = 0; i < blocks; ++i) {
    out[i] = {};
    for (int b = 0; b < 64; ++b) {
      const uint8_t c = text[64 * i + b];
      const auto set = [&](bool member) { return static_cast<uint64_t>(member) << b; };
      out[i].upper |= set(c >= 'A' && c <= 'Z');
      out[i].lower |= set(c >= 'a' && c <= 'z');
      out[i].digit |= set(c >= '0' && c <= '9');
      out[i].space |= set(c == ' ');
      out[i].newline |= set(c == '\n' || c == '\r');
      out[i].blank |= set(c == ' ' || (c >= '\t' && c <= '\r'));
      out[i].apostrophe |= set(c == '\'');
      out[i].high |= set(c >= 128);
      out[i].trailing |= set(c >= 128 && c < 0xC0);
    }
  }
}

#endif

}  // namespace pygpt::PYGPT_ISA_NAMESPACE
