// Products by vectors, for any instruction set. Included by products.h.
//
// Weights of a few output groups and some inputs are unpacked into the first-level cache as operands
// of one kind of words: float32, pairs of bfloat16, or pairs of 16-bit integers. One kernel
// multiplies them with words of all rows. So a format of weights is a way to unpack it, and costs
// nothing but that.
//
// Integer weights meet rows of 16-bit integers: x = row_scale * whole. The sums of one group of inputs
// are exact, so weights are not rounded, and rows only to 16 bits.
#pragma once

#include "products_unpack.h"

namespace {

// Rows whose sums fit the registers with one output group (two with 512 bits), and the most rows
// that are multiplied with kMaxSide groups.
constexpr int kMaxRows = kWidth == 16 ? 12 : kWidth == 8 ? 6 : 2;
constexpr int kFewRows = kWidth == 16 ? 4 : 1;
// Rows after which the weights are unpacked again; their sums are in the second-level cache.
constexpr int kRowsAtOnce = 256;
// Unpacked weights take half of the first-level cache; groups of inputs are not cut for it.
constexpr int kSliceWords = 4096;
constexpr int kSumsStride = kMaxSide * kTileOutputs;
constexpr int64_t kVectorScratchFloats = kRowsAtOnce * kSumsStride + 2 * kSliceWords;

// ---- the products of words ---------------------------------------------------------------------

struct FloatWords {
  typedef Vec Sum;
  static Sum add(Sum sum, WordVec w, uint32_t x) {
    return multiply_add(bit_cast<Vec>(w), broadcast(bit_cast<float>(x)), sum);
  }
};

#if defined(__AVX512BF16__)
struct BFloat16Words {
  typedef Vec Sum;
  static Sum add(Sum sum, WordVec w, uint32_t x) {
    return bit_cast<Vec>(_mm512_dpbf16_ps(bit_cast<__m512>(sum), bit_cast<__m512bh>(w),
                                          bit_cast<__m512bh>(_mm512_set1_epi32(int(x)))));
  }
};
#endif

struct ShortWords {
  typedef IntVec Sum;
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
#elif defined(__AVX2__)
    return sum + bit_cast<IntVec>(
                     _mm256_madd_epi16(bit_cast<__m256i>(w), _mm256_set1_epi32(int(x))));
#else
    const IntVec both = bit_cast<IntVec>(w);
    return sum + (both << 16 >> 16) * (int32_t(x << 16) >> 16) + (both >> 16) * (int32_t(x) >> 16);
#endif
  }
};

// Adds the products of `steps` words of kRows rows with those of kGroups output groups.
template <class Words, int kRows, int kGroups>
inline __attribute__((always_inline)) void add_words(
    const uint32_t* a, int64_t a_stride, const uint32_t* const* w, int64_t from, int steps,
    typename Words::Sum (&sums)[kRows][kGroups][kVecs]) {
  const uint32_t* b[kGroups];
  for (int g = 0; g < kGroups; ++g) b[g] = w[g] + from * kTileOutputs;
#pragma GCC unroll 4
  for (int step = 0; step < steps; ++step) {
    WordVec weights[kGroups][kVecs];
#pragma GCC unroll 4
    for (int g = 0; g < kGroups; ++g)
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v)
        weights[g][v] = load_words(b[g] + step * kTileOutputs + v * kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const uint32_t x = a[r * a_stride + step];
#pragma GCC unroll 4
      for (int g = 0; g < kGroups; ++g)
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) sums[r][g][v] = Words::add(sums[r][g][v], weights[g][v], x);
    }
  }
}

// ---- one slice of the inputs -----------------------------------------------------------------------

// Some inputs of some output groups, and the sums that they are added to.
struct Slice {
  const Product& p;
  // The words of each output group: unpacked, or bfloat16 weights in place.
  const uint32_t* words[kMaxSide];
  int64_t output_groups[kMaxSide];
  int64_t first_input;
  int num_inputs;
  // [rows, kSumsStride], from `first_row` on.
  float* sums;
  int64_t first_row;
};

// Products of the panel itself.
template <class Words, int kInputsToWord>
struct Floats {
  template <int kRows, int kGroups>
  static void multiply(const Slice& c, int side, int row) {
    const int64_t stride = c.p.panel_stride / kInputsToWord;
    const uint32_t* a = (const uint32_t*)c.p.panel + (c.first_row + row) * stride +
                        c.first_input / kInputsToWord;
    float* sums = c.sums + row * kSumsStride + side * kTileOutputs;
    Vec total[kRows][kGroups][kVecs];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
      for (int i = 0; i < kGroups * kVecs; ++i)
        total[r][i / kVecs][i % kVecs] = load(sums + r * kSumsStride + i * kWidth);
    add_words<Words, kRows, kGroups>(a, stride, c.words + side, 0, c.num_inputs / kInputsToWord,
                                     total);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
      for (int i = 0; i < kGroups * kVecs; ++i)
        store(sums + r * kSumsStride + i * kWidth, total[r][i / kVecs][i % kVecs]);
  }
};

// Adds the exact sums of one group of inputs, scaled, to [kRows, kSumsStride].
template <int kRows, int kGroups>
inline __attribute__((always_inline)) void add_group(
    const Product& p, const Wholes& wholes, const int64_t* output_groups, int64_t scale,
    int64_t row, const IntVec (&total)[kRows][kGroups][kVecs], float* sums) {
  const DType dtype = DType(p.weights.scale_dtype);
#pragma GCC unroll 8
  for (int i = 0; i < kGroups * kVecs; ++i) {
    const int64_t from = (output_groups[i / kVecs] * wholes.num_scales + scale) * kTileOutputs +
                         i % kVecs * kWidth;
    const Vec factor = load_some(p.weights.scales, dtype, from, kWidth);
    Vec minimum = {};
    if (p.weights.minimums) minimum = load_some(p.weights.minimums, dtype, from, kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      float* to = sums + r * kSumsStride + i * kWidth;
      const Vec whole = __builtin_convertvector(total[r][i / kVecs][i % kVecs], Vec);
      Vec sum = multiply_add(whole, factor, load(to));
      if (p.weights.minimums) {
        const float inputs = float(wholes.sums[(row + r) * wholes.num_scales + scale]);
        sum = multiply_add(minimum, broadcast(inputs), sum);
      }
      store(to, sum);
    }
  }
}

// Products of integer rows, scaled group by group.
struct Codes {
  template <int kRows, int kGroups>
  static void multiply(const Slice& c, int side, int row) {
    const Wholes wholes = wholes_of(c.p);
    const int64_t first_row = c.first_row + row;
    const uint32_t* a = wholes.words + first_row * wholes.word_stride + c.first_input / 2;
    float* sums = c.sums + row * kSumsStride + side * kTileOutputs;
    const int group_inputs = int(c.p.weights.group_inputs);
    int64_t scale = c.first_input / group_inputs;
    for (int at = 0; at < c.num_inputs; at += group_inputs, ++scale) {
      IntVec total[kRows][kGroups][kVecs] = {};
      add_words<ShortWords, kRows, kGroups>(a + at / 2, wholes.word_stride, c.words + side, at / 2,
                                            smaller(group_inputs, c.num_inputs - at) / 2, total);
      add_group<kRows, kGroups>(c.p, wholes, c.output_groups + side, scale, first_row, total, sums);
    }
  }
};

// Rows row to end, in blocks of kRows and then of fewer.
template <class Kind, int kRows, int kGroups>
inline void multiply_rows(const Slice& c, int side, int row, int end) {
  for (; row + kRows <= end; row += kRows) Kind::template multiply<kRows, kGroups>(c, side, row);
  if constexpr (kRows > 1) {
    constexpr int kFewer = kRows == 12 ? 8 : kRows == 6 ? 4 : kRows / 2;
    if (row < end) multiply_rows<Kind, kFewer, kGroups>(c, side, row, end);
  }
}

// Few rows have registers for all groups at once, so that their sums need not wait for each other.
template <class Kind, int kSide>
inline void multiply_slice(const Slice& c, int rows) {
  constexpr int kGroups = kWidth == 16 ? smaller(kSide, 2) : 1;
  if constexpr (kWidth == 16 && kSide == kMaxSide)
    if (rows <= kFewRows) return multiply_rows<Kind, kFewRows, kSide>(c, 0, 0, rows);
  for (int side = 0; side < kSide; side += kGroups)
    multiply_rows<Kind, kMaxRows, kGroups>(c, side, 0, rows);
}

template <int kSide>
inline void scale_rows(const Slice& c, int rows) {
  const float* scales = wholes_of(c.p).row_scales + c.first_row;
  for (int r = 0; r < rows; ++r)
    for (int i = 0; i < kSide * kTileOutputs; i += kWidth) {
      float* at = c.sums + r * kSumsStride + i;
      store(at, load(at) * scales[r]);
    }
}

}  // namespace

#include "products_bytes.h"

namespace {

// ---- for products.h ----------------------------------------------------------------------------

#if defined(__AVX512BF16__)
constexpr bool kHasPairs = true;
typedef Floats<BFloat16Words, 2> PanelProducts;
#else
constexpr bool kHasPairs = false;
typedef Floats<FloatWords, 1> PanelProducts;
#endif

// Sets the words of the slice that begins at `first_input`, using `memory` where they are unpacked.
template <int kSide>
inline void load_slice(Slice& c, uint32_t* memory) {
  const Product& p = c.p;
  const bool is_wide = p.weights.bits == 16, is_in_place = is_wide && kHasPairs;
  const int words_each = kSliceWords / larger(kSide, 2);
  int most = words_each / kTileOutputs * (is_wide && !kHasPairs ? 1 : 2);
  const int group_inputs = int(p.weights.group_inputs);
  if (!is_wide) most = larger(most / group_inputs, 1) * group_inputs;
  c.num_inputs = smaller(most, int(p.num_inputs - c.first_input));
  for (int side = 0; side < kSide; ++side) {
    const char* tiles = tiles_of(p, c.output_groups[side]) +
                        c.first_input / kByteTileInputs * tile_bytes(p.weights.bits);
    uint32_t* to = memory + side * (2 * kSliceWords / kMaxSide);
    c.words[side] = is_in_place ? (const uint32_t*)tiles : to;
    if (is_in_place) continue;
    if (is_wide) widen(tiles, c.num_inputs, to);
    else unpack_codes(p, tiles, c.num_inputs, to);
  }
}

template <int kSide>
inline void multiply_groups(const Product& p, int64_t group, float* scratch) {
  uint32_t* memory = (uint32_t*)(scratch + kRowsAtOnce * kSumsStride);
  const bool is_wide = p.weights.bits == 16;
  Slice c = {p};
  c.sums = scratch;
  for (int side = 0; side < kSide; ++side) c.output_groups[side] = group_at(p, group, side);
  for (c.first_row = 0; c.first_row < p.num_rows; c.first_row += kRowsAtOnce) {
    const int rows = smaller(int(p.num_rows - c.first_row), kRowsAtOnce);
    for (int r = 0; r < rows; ++r)
      for (int i = 0; i < kSide * kTileOutputs; i += kWidth)
        store(c.sums + r * kSumsStride + i, Vec{});
    const bool is_by_bytes = !is_wide && p.num_rows <= kDigitsRows;
    if (is_by_bytes) multiply_by_bytes<kSide>(p, c.output_groups, c.sums);
    c.first_input = is_by_bytes ? p.num_inputs : 0;
    for (; c.first_input < p.num_inputs; c.first_input += c.num_inputs) {
      load_slice<kSide>(c, memory);
      if (is_wide) multiply_slice<PanelProducts, kSide>(c, rows);
      else multiply_slice<Codes, kSide>(c, rows);
    }
    if (!is_wide) scale_rows<kSide>(c, rows);
    finish(p, c.sums, kSumsStride, group, kSide, c.first_row, rows);
  }
}

inline void product_by_vectors(const Product& p, int64_t begin, int64_t end, float* scratch) {
  const auto multiply = [&](int side, int64_t group) {
    if (side == 4) multiply_groups<4>(p, group, scratch);
    if (side == 2) multiply_groups<2>(p, group, scratch);
    if (side == 1) multiply_groups<1>(p, group, scratch);
  };
  const int few = p.weights.scales ? larger(kFewRows, kDigitsRows) : kFewRows;
  product_by(multiply, p.num_rows <= few ? kMaxSide : 2, p, begin, end);
}

}  // namespace
