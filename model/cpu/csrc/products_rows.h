// Rows of activations as integers, for weights that are integers. Included by products_vectors.h.
//
// x = row_scale * whole, relative to the largest of the row. The products take either pairs of wholes,
// or their two bytes apart, high and low: both give the same exact sums.
#pragma once

#include "simd.h"

namespace {

#if defined(__AVX512BF16__)
typedef BFloat16 PanelElement;
#else
typedef float PanelElement;
#endif

// Vectors of the 16 outputs of a group.
constexpr int kVecs = kTileOutputs / kWidth;

// Up to so many rows are multiplied by bytes, where there is an instruction for it.
#if defined(__AVX512VNNI__)
constexpr int kDigitsRows = 8;
#elif defined(__AVXVNNI__)
constexpr int kDigitsRows = 2;
#else
constexpr int kDigitsRows = 0;
#endif

inline WordVec load_words(const void* from) {
  WordVec v;
  __builtin_memcpy(&v, from, sizeof(v));
  return v;
}
inline void store_words(void* to, WordVec v) { __builtin_memcpy(to, &v, sizeof(v)); }

// Rows of integers as `split_wholes` writes them.
struct Wholes {
  int64_t num_scales;
  // [rows, word_stride]: pairs of 16-bit integers.
  int64_t word_stride;
  uint32_t* words;
  // [rows, digit_stride]: fours of their high bytes, and of their low ones.
  int64_t digit_stride;
  uint32_t* high;
  uint32_t* low;
  float* row_scales;
  // [rows, scales]: the sum of each group of inputs.
  int32_t* sums;
};

// The largest whole = 256 * high + low with both digits in -127 to 127.
constexpr float kMaxWhole = 127 * 256 + 127;
constexpr int kMinGroupInputs = 16;
// Rows are a cache line longer than they need: no two of them share a set of the cache.
constexpr int kLineWords = 16;
// Rows that may be read beyond the last.
constexpr int kRowsPadding = 8;

inline int64_t wholes_bytes(int64_t rows, int64_t num_inputs) {
  return (rows + kRowsPadding) *
         (num_inputs + 3 * kLineWords + 1 + num_inputs / kMinGroupInputs) * 4;
}

inline Wholes wholes_of(const Product& p) {
  const int64_t rows = p.num_rows + kRowsPadding;
  Wholes w;
  w.num_scales = num_scales(p);
  w.word_stride = p.num_inputs / 2 + kLineWords;
  w.digit_stride = p.num_inputs / 4 + kLineWords;
  w.words = (uint32_t*)p.split;
  w.high = w.words + rows * w.word_stride;
  w.low = w.high + rows * w.digit_stride;
  w.row_scales = (float*)(w.low + rows * w.digit_stride);
  w.sums = (int32_t*)(w.row_scales + rows);
  return w;
}

// The two inner numbers of each four change places: unpacked codes are pairs of every other one.
inline WordVec swap_inner(WordVec words) {
  typedef uint64_t LongVec __attribute__((vector_size(kWidth * 4)));
  const LongVec fours = bit_cast<LongVec>(words);
  return bit_cast<WordVec>((fours & 0xffff00000000ffffull) | (fours & 0xffff0000ull) << 16 |
                           (fours >> 16 & 0xffff0000ull));
}

inline void sum_groups(const Product& p, const Wholes& w, int64_t row) {
  const int16_t* wholes = (const int16_t*)(w.words + row * w.word_stride);
  for (int64_t scale = 0; scale < w.num_scales; ++scale) {
    const int64_t first = scale * p.weights.group_inputs, left = p.num_inputs - first;
    const int64_t count = left < p.weights.group_inputs ? left : p.weights.group_inputs;
    int32_t total = 0;
    for (int64_t i = first; i < first + count; ++i) total += wholes[i];
    w.sums[row * w.num_scales + scale] = total;
  }
}

// The digits of a row, in the order of its inputs.
inline void write_digits(const Product& p, const Wholes& w, int64_t row) {
  const int16_t* wholes = (const int16_t*)(w.words + row * w.word_stride);
  int8_t* high = (int8_t*)(w.high + row * w.digit_stride);
  int8_t* low = (int8_t*)(w.low + row * w.digit_stride);
  for (int64_t i = 0; i < p.num_inputs; ++i) {
    high[i] = int8_t((wholes[i] + 128) >> 8);
    // The remainder after 256 * high is the low byte, with a sign.
    low[i] = int8_t(wholes[i]);
  }
}

// Writes rows begin to end of the panel as 16-bit integers, relative to the largest of their row.
void split_wholes(const Product& p, int64_t begin, int64_t end) {
  const Wholes w = wholes_of(p);
  // Adding 1.5 * 2^23 rounds to an integer, which then stands in the low bits.
  const Vec magic = broadcast(12582912.0f);
  const uint32_t infinity = 0x7f800000;
  for (int64_t row = begin; row < end; ++row) {
    const PanelElement* from = (const PanelElement*)p.panel + row * p.panel_stride;
    // Bits of positive numbers are in their order, above them an infinity's, then a NaN's.
    WordVec most = {};
    for (int64_t i = 0; i < p.num_inputs; i += kWidth) {
      const WordVec bits = bit_cast<WordVec>(load(from + i)) & 0x7fffffff;
      most = bits > most ? bits : most;
    }
    uint32_t bits = 0;
    for (int i = 0; i < kWidth; ++i) bits = most[i] > bits ? most[i] : bits;
    const float largest = bit_cast<float>(bits);
    // NaN and infinity make the whole row NaN, since infinity times zero is NaN.
    w.row_scales[row] = bits < infinity ? largest / kMaxWhole : __builtin_inff();
    // The smallest numbers have no finite factor: they are zero beside any weight.
    const float factor = kMaxWhole / largest;
    const bool has_scale = bits > 0 && bits < infinity && factor < 3e38f;
    uint32_t* to = w.words + row * w.word_stride;
    for (int64_t i = 0; i < p.num_inputs; i += kWidth) {
      const Vec x = has_scale ? multiply_add(load(from + i), broadcast(factor), magic) : magic;
      const HalfVec whole = __builtin_convertvector(bit_cast<WordVec>(x), HalfVec);
      __builtin_memcpy((char*)to + 2 * i, &whole, sizeof(whole));
    }
    sum_groups(p, w, row);
    if (p.num_rows <= kDigitsRows) write_digits(p, w, row);
    for (int64_t i = 0; i < p.num_inputs / 2; i += kWidth)
      store_words(to + i, swap_inner(load_words(to + i)));
  }
}

}  // namespace
