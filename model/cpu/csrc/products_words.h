// Products of words by vectors: a word is one float32 input, a pair of bfloat16 ones or of 16-bit
// integers, or four bytes. Included by products_vectors.h.
#pragma once

#include "products_rows.h"

namespace {

struct FloatWords {
  typedef Vec Sum;
  static constexpr int kInputs = 1;
  static Sum add(Sum sum, WordVec w, uint32_t x) {
    return multiply_add(bit_cast<Vec>(w), broadcast(bit_cast<float>(x)), sum);
  }
};

#if defined(__AVX512BF16__)
struct BFloat16Words {
  typedef Vec Sum;
  static constexpr int kInputs = 2;
  static Sum add(Sum sum, WordVec w, uint32_t x) {
    return bit_cast<Vec>(_mm512_dpbf16_ps(bit_cast<__m512>(sum), bit_cast<__m512bh>(w),
                                          bit_cast<__m512bh>(_mm512_set1_epi32(int(x)))));
  }
};
#elif defined(OCTAVO_NEON_BF16)
struct BFloat16Words {
  typedef Vec Sum;
  static constexpr int kInputs = 2;
  static Sum add(Sum sum, WordVec w, uint32_t x) {
    return bit_cast<Vec>(vbfdotq_f32(bit_cast<float32x4_t>(sum), bit_cast<bfloat16x8_t>(w),
                                     vreinterpretq_bf16_u32(vdupq_n_u32(x))));
  }
};
#endif

struct ShortWords {
  typedef IntVec Sum;
  static constexpr int kInputs = 2;
  static Sum add(Sum sum, WordVec w, uint32_t x) {
#if defined(__AVX512VNNI__)
    return bit_cast<IntVec>(_mm512_dpwssd_epi32(bit_cast<__m512i>(sum), bit_cast<__m512i>(w),
                                                _mm512_set1_epi32(int(x))));
#elif defined(__AVX512F__)
    return sum + bit_cast<IntVec>(
                     _mm512_madd_epi16(bit_cast<__m512i>(w), _mm512_set1_epi32(int(x))));
#elif defined(__AVXVNNI__)
    return bit_cast<IntVec>(_mm256_dpwssd_avx_epi32(
        bit_cast<__m256i>(sum), bit_cast<__m256i>(w), _mm256_set1_epi32(int(x))));
#elif defined(OCTAVO_NEON)
    // The first inputs of four outputs, then the second ones: see `store_pairs`.
    const int16x4_t inputs = vreinterpret_s16_u32(vdup_n_u32(x));
    const int16x8_t pairs = bit_cast<int16x8_t>(w);
    const int32x4_t first = vmlal_lane_s16(bit_cast<int32x4_t>(sum), vget_low_s16(pairs), inputs, 0);
    return bit_cast<IntVec>(vmlal_high_lane_s16(first, pairs, inputs, 1));
#elif defined(__AVX2__)
    return sum + bit_cast<IntVec>(
                     _mm256_madd_epi16(bit_cast<__m256i>(w), _mm256_set1_epi32(int(x))));
#else
    const IntVec both = bit_cast<IntVec>(w);
    return sum + (both << 16 >> 16) * (int32_t(x << 16) >> 16) + (both >> 16) * (int32_t(x) >> 16);
#endif
  }
};

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
// Codes without a sign, and bytes with one.
struct ByteWords {
  typedef IntVec Sum;
  static constexpr int kInputs = 4;
  static IntVec add(IntVec sum, WordVec w, uint32_t x) {
#if defined(__AVX512VNNI__)
    return bit_cast<IntVec>(_mm512_dpbusd_epi32(bit_cast<__m512i>(sum), bit_cast<__m512i>(w),
                                                _mm512_set1_epi32(int(x))));
#else
    return bit_cast<IntVec>(_mm256_dpbusd_avx_epi32(
        bit_cast<__m256i>(sum), bit_cast<__m256i>(w), _mm256_set1_epi32(int(x))));
#endif
  }
};
#else
typedef ShortWords ByteWords;
#endif

// Adds the products of `words` words of kRows rows with those of kGroups output groups.
template <class Words, int kRows, int kGroups>
inline __attribute__((always_inline)) void add_words(
    const uint32_t* a, int64_t row_stride, const uint32_t* const (&w)[kGroups],
    int words, typename Words::Sum (&sums)[kRows][kGroups][kVecs]) {
#pragma GCC unroll 4
  for (int i = 0; i < words; ++i) {
    WordVec weights[kGroups][kVecs];
#pragma GCC unroll 4
    for (int g = 0; g < kGroups; ++g)
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v)
        weights[g][v] = load_words(w[g] + i * kTileOutputs + v * kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const uint32_t x = a[r * row_stride + i];
#pragma GCC unroll 4
      for (int g = 0; g < kGroups; ++g)
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) sums[r][g][v] = Words::add(sums[r][g][v], weights[g][v], x);
    }
  }
}

}  // namespace
