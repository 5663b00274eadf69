// Codes of a byte multiplied as integers: queries and weights are whole numbers of 15 bits, sums are
// exact, and floats come back with the factor of each lane. Codes take one instruction for 32 of
// them, where floats take four or five.
#pragma once

#include "attention_vectors.h"

#if defined(__AVX512VNNI__)

namespace {

// A sum over kMaxHeadDim queries times codes, or kChunkKeys weights times codes, has 31 bits.
constexpr float kLargestQuery = 16383.0f;
constexpr float kLargestWeight = 32767.0f;

// Rounds floats to words of `largest` at most, and returns what a word stands for. `top` has the bits
// of magnitudes: where one is not finite, neither is the result.
inline float store_words(const float* from, int begin, int end, IntVec top, float largest,
                         int16_t* to) {
  const float most = bit_cast<float>(_mm512_reduce_max_epi32(bit_cast<__m512i>(top)));
  const Vec steps = broadcast(most > 1e-30f ? largest / most : 0.0f);
  for (int i = begin; i < end; i += kWidth) {
    const __m512i words = _mm512_cvtps_epi32(bit_cast<__m512>(load(from + i) * steps));
    _mm256_storeu_si256((__m256i*)(to + i), _mm512_cvtepi32_epi16(words));
  }
  return most / largest;
}

// Pairs of words: two dimensions of a key, or one dimension of two keys' values. Interleaved as pairs
// of bfloat16 are.
template <>
struct Operands<int16_t> {
  typedef int16_t Element;
  typedef __m512i Operand;
  typedef IntVec Sum;
  static constexpr bool kIsRounded = true;
  static constexpr bool kIsWidened = false;
  static constexpr int kDims = 2 * kWidth;
  static constexpr int kKeys = 2;

  static Operand query(const Element* at) { return _mm512_loadu_si512(at); }
  static Operand key(const int16_t* row) { return _mm512_loadu_si512(row); }
  static Operand half_key(const int16_t* row) {
    return _mm512_zextsi256_si512(_mm256_loadu_si256((const __m256i*)row));
  }
  static Operand weight(const Element* at) {
    int32_t pair;
    __builtin_memcpy(&pair, at, sizeof(pair));
    return _mm512_set1_epi32(pair);
  }
  template <int kVectors>
  static Operand value(const int16_t* const* rows, int i) {
    if constexpr (kVectors == 1) {
      const __m512i even = _mm512_cvtepi16_epi32(_mm256_loadu_si256((const __m256i*)rows[0]));
      const __m512i odd = _mm512_cvtepi16_epi32(_mm256_loadu_si256((const __m256i*)rows[1]));
      return pair(even, odd);
    }
    const int at = i / 2 * kDims;
    return interleave(key(rows[0] + at), key(rows[1] + at), i);
  }
  static IntVec add(IntVec sum, Operand x, Operand y) {
    return bit_cast<IntVec>(_mm512_dpwssd_epi32(bit_cast<__m512i>(sum), x, y));
  }
  // Also makes them floats.
  static void restore_order(float* sums, int head_dim) {
    for (int d = 0; d < head_dim; d += kWidth)
      store(sums + d, __builtin_convertvector(load_total<IntVec>(sums + d), Vec));
    restore_order_of_pairs(sums, head_dim);
  }

  static float store_query(const float* from, int depth, Element* to) {
    IntVec top = {};
    for (int d = 0; d < depth; d += kWidth) {
      const IntVec bits = bit_cast<IntVec>(load(from + d)) & INT32_MAX;
      top = bits > top ? bits : top;
    }
    return store_words(from, 0, depth, top, kLargestQuery, to);
  }
  static float store_weights(float* weights, int from, int to, IntVec top) {
    return store_words(weights, from, to, top, kLargestWeight, (Element*)weights);
  }

 protected:
  static Operand pair(__m512i even, __m512i odd) {
    return _mm512_mask_blend_epi16(0xaaaaaaaa, even, _mm512_slli_epi32(odd, 16));
  }
  static Operand interleave(__m512i even, __m512i odd, int i) {
    return i % 2 ? _mm512_unpackhi_epi16(even, odd) : _mm512_unpacklo_epi16(even, odd);
  }
};

// The same from bytes.
template <>
struct Operands<int8_t> : Operands<int16_t> {
  static constexpr bool kIsWidened = true;

  static Operand key(const int8_t* row) {
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)row));
  }
  static Operand half_key(const int8_t* row) { return _mm512_zextsi256_si512(half(row)); }
  template <int kVectors>
  static Operand value(const int8_t* const* rows, int i) {
    if constexpr (kVectors == 1) {
      const __m512i even = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)rows[0]));
      const __m512i odd = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)rows[1]));
      return pair(even, odd);
    }
    const int at = i / 2 * kDims;
    return interleave(key(rows[0] + at), key(rows[1] + at), i);
  }
  static void widen(const int8_t* from, int16_t* to) {
    _mm256_storeu_si256((__m256i*)to, half(from));
  }

 private:
  static __m256i half(const int8_t* row) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)row));
  }
};

}  // namespace

#endif
