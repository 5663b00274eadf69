// Products by vectors, for any instruction set. Included by products.h.
//
// Weights of a few output groups and some inputs are unpacked into the first-level cache as operands
// of one kind of words: float32, pairs of bfloat16, or pairs of 16-bit integers. One kernel
// multiplies them with words of all rows. So a format of weights is a way to unpack it, and costs
// nothing but that.
//
// Integer weights meet rows of 16-bit integers, with a scale to a row, or of 8-bit ones, with a scale to
// 32 inputs. The sums of inputs with one scale are exact, so weights are not rounded, but rows are.
#pragma once

#include <type_traits>

#include "products_unpack.h"
#include "products_words.h"

namespace {

// Rows whose sums fit the registers with one output group (two with 512 bits), and the most rows
// that are multiplied with kMaxSide groups.
constexpr int kMaxRows = kWidth == 16 ? 12 : kWidth == 8 ? 6 : kHasManyRegisters ? 4 : 2;
constexpr int kFewRows = kWidth == 16 ? 4 : 1;
// Rows after which the weights are unpacked again; their sums are in the second-level cache. Whole
// blocks of rows.
constexpr int kRowsAtOnce = 252;
// Unpacked weights take half of the first-level cache; groups of inputs are not cut for it.
constexpr int kSliceWords = 4096;
constexpr int kSumsStride = kMaxSide * kTileOutputs;
constexpr int64_t kVectorScratchFloats = kRowsAtOnce * kSumsStride + 2 * kSliceWords;

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

// [rows, output groups]: a vector for each.
template <class V, int kRows, int kGroups>
using Block = V[kRows][kGroups][kVecs];

// The sums of the slice before; zeros before the first.
template <int kRows, int kGroups>
inline __attribute__((always_inline)) void load_sums(const float* from, int64_t first_input,
                                                     Block<Vec, kRows, kGroups>& sums) {
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int i = 0; i < kGroups * kVecs; ++i)
      sums[r][i / kVecs][i % kVecs] =
          first_input ? load(from + r * kSumsStride + i * kWidth) : Vec{};
}

template <int kRows, int kGroups>
inline __attribute__((always_inline)) void store_sums(const Block<Vec, kRows, kGroups>& sums,
                                                      float* to) {
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int i = 0; i < kGroups * kVecs; ++i)
      store(to + r * kSumsStride + i * kWidth, sums[r][i / kVecs][i % kVecs]);
}

// Products of the panel itself.
template <class Words>
struct Floats {
  static constexpr int kRowsAtMost = kMaxRows, kInputsToWord = Words::kInputs;
  template <int kRows, int kGroups>
  static __attribute__((noinline)) void multiply(const Slice& c, int side, int row) {
    const int64_t stride = c.p.panel_stride / kInputsToWord;
    const uint32_t* a = (const uint32_t*)c.p.panel + (c.first_row + row) * stride +
                        c.first_input / kInputsToWord;
    float* sums = c.sums + row * kSumsStride + side * kTileOutputs;
    Block<Vec, kRows, kGroups> total;
    load_sums<kRows, kGroups>(sums, c.first_input, total);
    const uint32_t* w[kGroups];
    for (int g = 0; g < kGroups; ++g) w[g] = c.words[side + g];
    add_words<Words, kRows, kGroups>(a, stride, w, c.num_inputs / kInputsToWord, total);
    store_sums<kRows, kGroups>(total, sums);
  }
};

// The scales of the weights of kGroups output groups, from one group of inputs to the next.
template <int kGroups>
struct Factors {
  const Weights& weights;
  int64_t at[kGroups];
  int64_t inputs_left;

  Factors(const Product& p, const int64_t* output_groups, int64_t input) : weights(p.weights) {
    for (int g = 0; g < kGroups; ++g)
      at[g] = (output_groups[g] * num_scales(p) + input / weights.group_inputs) * kTileOutputs;
    inputs_left = weights.group_inputs - input % weights.group_inputs;
  }
  Vec load_from(const void* factors, int g, int v) const {
    return load_some(factors, DType(weights.scale_dtype), at[g] + v * kWidth, kWidth);
  }
  void advance(int64_t inputs) {
    if ((inputs_left -= inputs) > 0) return;
    inputs_left += weights.group_inputs;
    for (int g = 0; g < kGroups; ++g) at[g] += kTileOutputs;
  }
};

// Sums in registers.
template <int kRows, int kGroups>
struct KeptSums {
  Block<Vec, kRows, kGroups> sums;
  Vec get(int r, int g, int v) const { return sums[r][g][v]; }
  void set(int r, int g, int v, Vec sum) { sums[r][g][v] = sum; }
};

// Sums in memory; zeros as long as `is_first`.
struct StoredSums {
  float* memory;
  bool is_first;
  float* at(int r, int g, int v) const {
    return memory + r * kSumsStride + g * kTileOutputs + v * kWidth;
  }
  Vec get(int r, int g, int v) const { return is_first ? Vec{} : load(at(r, g, v)); }
  void set(int r, int g, int v, Vec sum) { store(at(r, g, v), sum); }
};

// Adds the exact sums of one step, scaled. `scales` and `input_sums` are those of the step, in lines.
template <bool kIsByteRows, int kRows, int kGroups, class Sums>
inline __attribute__((always_inline)) void add_step(
    const Factors<kGroups>& factors, const float* scales, const float* input_sums,
    const Block<IntVec, kRows, kGroups>& total, Sums& sums) {
  const void* minimums = factors.weights.minimums;
#pragma GCC unroll 4
  for (int g = 0; g < kGroups; ++g)
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      const Vec factor = factors.load_from(factors.weights.scales, g, v);
      const Vec minimum = minimums ? factors.load_from(minimums, g, v) : Vec{};
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        Vec whole = __builtin_convertvector(total[r][g][v], Vec);
        if (kIsByteRows) whole = whole * broadcast(scales[r * kLineWords]);
        Vec sum = multiply_add(whole, factor, sums.get(r, g, v));
        if (minimums) sum = multiply_add(minimum, broadcast(input_sums[r * kLineWords]), sum);
        sums.set(r, g, v, sum);
      }
    }
}

// Products of integer rows, scaled step by step.
template <bool kIsByteRows>
struct Codes {
  typedef typename std::conditional<kIsByteRows, ByteWords, ShortWords>::type Words;
  static constexpr int kRowsAtMost = smaller(kWordRows, kMaxRows), kInputsToWord = Words::kInputs;

  template <int kRows, int kGroups>
  static __attribute__((noinline)) void multiply(const Slice& c, int side, int row) {
    const Wholes wholes = wholes_of(c.p);
    const int64_t first_row = c.first_row + row;
    const uint32_t* w[kGroups];
    for (int g = 0; g < kGroups; ++g) w[g] = c.words[side + g];
    const int step_inputs = int(wholes.step_inputs);
    int64_t word = c.first_input / kInputsToWord, step = c.first_input / step_inputs;
    Factors<kGroups> factors(c.p, c.output_groups + side, c.first_input);
    float* memory = c.sums + row * kSumsStride + side * kTileOutputs;
    KeptSums<kRows, kGroups> kept;
    if (kKeepsSums) load_sums<kRows, kGroups>(memory, c.first_input, kept.sums);
    StoredSums stored = {memory, c.first_input == 0};
    for (int at = 0; at < c.num_inputs; at += step_inputs, ++step) {
      const int64_t first = wholes.step_at(first_row, step, false);
      Block<IntVec, kRows, kGroups> total = {};
      if (kInputsToWord == 4)
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
          for (int i = 0; i < kGroups * kVecs; ++i)
            total[r][i / kVecs][i % kVecs] -= wholes.offsets[first + r * kLineWords];
      // Line by line: a step is within one, or takes whole ones.
      const int64_t end = word + smaller(step_inputs, c.num_inputs - at) / kInputsToWord;
      const int together = smaller(int(end - word), kLineWords);
      for (; word < end; word += together) {
        const uint32_t* a = wholes.words + line_at<kWordRows>(first_row, word, wholes.num_words);
        add_words<Words, kRows, kGroups>(a, kLineWords, w, together, total);
        for (int g = 0; g < kGroups; ++g) w[g] += together * kTileOutputs;
      }
      const float *scales = wholes.scales + first, *input_sums = wholes.input_sums + first;
      if (kKeepsSums)
        add_step<kIsByteRows, kRows, kGroups>(factors, scales, input_sums, total, kept);
      else
        add_step<kIsByteRows, kRows, kGroups>(factors, scales, input_sums, total, stored);
      stored.is_first = false;
      factors.advance(step_inputs);
    }
    if (kKeepsSums) store_sums<kRows, kGroups>(kept.sums, memory);
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
    multiply_rows<Kind, Kind::kRowsAtMost, kGroups>(c, side, 0, rows);
}

}  // namespace

#include "products_bytes.h"
#include "products_neon.h"

namespace {

// ---- for products.h ----------------------------------------------------------------------------

#if defined(OCTAVO_NEON_BF16)
constexpr bool kHasPairs = true;
typedef RowPairs PanelProducts;
constexpr auto& unpack_floats = pair_up;
#elif defined(__AVX512BF16__)
constexpr bool kHasPairs = true;
typedef Floats<BFloat16Words> PanelProducts;
constexpr auto& unpack_floats = widen;
#else
constexpr bool kHasPairs = false;
typedef Floats<FloatWords> PanelProducts;
constexpr auto& unpack_floats = widen;
#endif

#if defined(OCTAVO_NEON_DOTPROD)
template <bool kIsByteRows>
using IntegerProducts = Digits<kIsByteRows>;
constexpr auto& unpack_integers = unpack_digits;
#else
template <bool kIsByteRows>
using IntegerProducts = Codes<kIsByteRows>;
constexpr auto& unpack_integers = unpack_codes;
#endif

// Sets the words of the slice that begins at `first_input`, using `memory` where they are unpacked.
template <int kSide>
inline void load_slice(Slice& c, uint32_t* memory) {
  const Product& p = c.p;
  const bool is_wide = p.weights.bits == 16;
  const bool is_in_place = is_wide && kHasPairs && (!kHasRowPairs || p.num_rows == 1);
  const int words_each = kSliceWords / larger(kSide, 2);
  int most = words_each / kTileOutputs * (is_wide && !kHasPairs ? 1 : is_by_fours(p) ? 4 : 2);
  const int group_inputs = int(p.weights.group_inputs);
  if (!is_wide) most = larger(most / group_inputs, 1) * group_inputs;
  c.num_inputs = smaller(most, int(p.num_inputs - c.first_input));
  for (int side = 0; side < kSide; ++side) {
    const char* tiles = tiles_of(p, c.output_groups[side]) +
                        c.first_input / kByteTileInputs * tile_bytes(p.weights.bits);
    uint32_t* to = memory + side * (2 * kSliceWords / kMaxSide);
    c.words[side] = is_in_place ? (const uint32_t*)tiles : to;
    if (is_in_place) continue;
    if (is_wide) unpack_floats(tiles, c.num_inputs, to);
    else unpack_integers(p, tiles, c.num_inputs, to);
  }
}

template <int kSide>
inline void multiply_groups(const Product& p, int64_t group, float* scratch) {
  uint32_t* memory = (uint32_t*)(scratch + kRowsAtOnce * kSumsStride);
  const bool is_wide = p.weights.bits == 16;
  const float* row_scales = is_wide || has_byte_rows(p) ? nullptr : wholes_of(p).row_scales;
  Slice c = {p};
  c.sums = scratch;
  for (int side = 0; side < kSide; ++side) c.output_groups[side] = group_at(p, group, side);
  for (c.first_row = 0; c.first_row < p.num_rows; c.first_row += kRowsAtOnce) {
    const int rows = smaller(int(p.num_rows - c.first_row), kRowsAtOnce);
    const bool is_by_bytes = !is_wide && p.num_rows <= kDigitsRows;
    if (is_by_bytes) multiply_by_bytes<kSide>(p, c.output_groups, c.sums);
    c.first_input = is_by_bytes ? p.num_inputs : 0;
    for (; c.first_input < p.num_inputs; c.first_input += c.num_inputs) {
      load_slice<kSide>(c, memory);
      if (is_wide) multiply_slice<PanelProducts, kSide>(c, rows);
      else if (has_byte_rows(p)) multiply_slice<IntegerProducts<true>, kSide>(c, rows);
      else multiply_slice<IntegerProducts<false>, kSide>(c, rows);
    }
    finish(p, c.sums, kSumsStride, group, kSide, c.first_row, rows, row_scales);
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
