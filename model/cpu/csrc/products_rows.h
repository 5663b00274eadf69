// Rows of activations as integers, for weights that are integers. Included by products_vectors.h.
//
// Of 16 bits: x = row_scale * whole, relative to the largest of the row. The products take either pairs
// of wholes, or their two bytes apart, high and low: both give the same exact sums.
// Of 8 bits: x = block_scale * whole, relative to the largest of 32 inputs. The products take fours of
// bytes where there is an instruction for it, otherwise pairs of wholes.
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

// Up to so many rows are multiplied by bytes without unpacking, where there is an instruction for it.
#if defined(__AVX512VNNI__)
constexpr int kDigitsRows = kMaxDigitsRows;
#elif defined(__AVXVNNI__)
constexpr int kDigitsRows = 2;
#else
constexpr int kDigitsRows = 0;
#endif
constexpr bool kHasByteProducts = kDigitsRows > 0;

// Rows that are multiplied with codes at once, and whose words stand side by side. With six the sums
// stay in registers beside the integers that are added to them. Where a product takes two instructions,
// or there are 16 registers, all of them have integers.
#if defined(__AVX512F__) && !defined(__AVX512VNNI__)
constexpr int kWordRows = 12;
#else
constexpr int kWordRows = 6;
#endif
static_assert(kSplitRows % kWordRows == 0);
#if defined(__AVX512VNNI__)
constexpr bool kKeepsSums = true;
#else
constexpr bool kKeepsSums = false;
#endif

inline WordVec load_words(const void* from) {
  WordVec v;
  __builtin_memcpy(&v, from, sizeof(v));
  return v;
}
inline void store_words(void* to, WordVec v) { __builtin_memcpy(to, &v, sizeof(v)); }

// Rows of integers as `split_wholes` writes them.
struct Wholes {
  // Inputs whose products are summed as integers: those of one scale, of weights and of rows.
  int64_t step_inputs;
  int64_t num_steps;
  // [rows, num_inputs]
  int16_t* wholes;
  // [blocks of kWordRows, words, kWordRows]: pairs of wholes, or fours of bytes.
  uint32_t* words;
  // [fours, kDigitsRows]: fours of their high bytes, and of their low ones. Of bytes, high alone.
  uint32_t* high;
  uint32_t* low;
  // [rows], of 16 bits.
  float* row_scales;
  // Three numbers of each step, [blocks of step_rows, steps, step_rows]. Of rows of 8 bits their scale;
  // the sum of the wholes times the offset of the codes, where codes are bytes without a sign; the sum
  // of the inputs (of 16 bits: before the scale of the row).
  int64_t step_rows;
  float* scales;
  int32_t* offsets;
  float* input_sums;

  int64_t at(int64_t row, int64_t step) const {
    return row / step_rows * step_rows * num_steps + step * step_rows + row % step_rows;
  }
};

// The largest whole = 256 * high + low with both digits in -127 to 127.
constexpr float kMaxWhole = 127 * 256 + 127;
constexpr float kMaxByte = 127;
// Inputs that share a scale in rows of 8 bits.
constexpr int kBlockInputs = 32;
constexpr int kMinGroupInputs = 16;
// Room for the rows of the last block, of words or of digits.
constexpr int kRowsPadding = kSplitRows;

inline int64_t wholes_bytes(int64_t rows, int64_t num_inputs) {
  const int64_t floats = num_inputs + 1 + 3 * num_inputs / kMinGroupInputs;
  return ((rows + kRowsPadding) * floats + kDigitsRows * num_inputs / 2) * 4;
}

inline bool has_byte_rows(const Product& p) { return p.weights.activation_bits == 8; }
// Whether the words of rows are fours of bytes.
inline bool is_by_fours(const Product& p) { return kHasByteProducts && has_byte_rows(p); }

inline Wholes wholes_of(const Product& p) {
  const int64_t rows = p.num_rows + kRowsPadding;
  Wholes w;
  w.step_inputs = p.weights.group_inputs;
  if (has_byte_rows(p) && w.step_inputs > kBlockInputs) w.step_inputs = kBlockInputs;
  w.num_steps = (p.num_inputs + w.step_inputs - 1) / w.step_inputs;
  w.wholes = (int16_t*)p.split;
  w.words = (uint32_t*)(w.wholes + rows * p.num_inputs);
  w.high = w.words + rows * p.num_inputs / 2;
  w.low = w.high + kDigitsRows * p.num_inputs / 4;
  w.row_scales = (float*)(w.low + kDigitsRows * p.num_inputs / 4);
  w.step_rows = p.num_rows <= kDigitsRows ? kDigitsRows : kWordRows;
  w.scales = w.row_scales + rows;
  w.offsets = (int32_t*)(w.scales + rows * w.num_steps);
  w.input_sums = (float*)(w.offsets + rows * w.num_steps);
  return w;
}

// Codes of eight bits have a sign. Products of bytes take codes without one: 128 is added to each.
inline constexpr uint32_t sign_flip(int bits) { return bits == 8 ? 0x80808080u : 0; }
inline int32_t byte_offset(const Weights& weights) {
  return weights.bits == 8 ? 128 : int32_t(weights.code_offset);
}

inline void sum_steps(const Product& p, const Wholes& w, int64_t row) {
  const int16_t* wholes = w.wholes + row * p.num_inputs;
  for (int64_t step = 0; step < w.num_steps; ++step) {
    const int64_t first = step * w.step_inputs, left = p.num_inputs - first;
    const int64_t count = left < w.step_inputs ? left : w.step_inputs;
    int32_t total = 0;
    for (int64_t i = first; i < first + count; ++i) total += wholes[i];
    const int64_t at = w.at(row, step);
    w.offsets[at] = byte_offset(p.weights) * total;
    w.input_sums[at] = float(total) * (has_byte_rows(p) ? w.scales[at] : 1.0f);
  }
}

// The low bytes of four wholes.
inline uint32_t low_bytes(uint64_t four) {
  four &= 0x00ff00ff00ff00ffull;
  four = (four | four >> 8) & 0x0000ffff0000ffffull;
  return uint32_t(four | four >> 16);
}

inline uint64_t load_wholes(const int16_t* from) {
  uint64_t four;
  __builtin_memcpy(&four, from, sizeof(four));
  return four;
}

// The digits of a row, in the order of its inputs.
inline void write_digits(const Product& p, const Wholes& w, int64_t row) {
  const int16_t* from = w.wholes + row * p.num_inputs;
  for (int64_t i = 0; i < p.num_inputs / 4; ++i, from += 4) {
    int16_t high[4];
    for (int at = 0; at < 4; ++at) high[at] = int16_t((from[at] + 128) >> 8);
    const int64_t to = i * kDigitsRows + row;
    // The remainder after 256 * high is the low byte, with a sign.
    w.low[to] = low_bytes(load_wholes(from));
    w.high[to] = has_byte_rows(p) ? w.low[to] : low_bytes(load_wholes(high));
  }
}

// The words of a row. Pairs are of every other whole, as unpacked codes are.
inline void write_words(const Product& p, const Wholes& w, int64_t row) {
  const int16_t* from = w.wholes + row * p.num_inputs;
  const int64_t num_words = p.num_inputs / (is_by_fours(p) ? 4 : 2);
  uint32_t* to = w.words + row / kWordRows * kWordRows * num_words + row % kWordRows;
  for (int64_t i = 0; i < p.num_inputs; i += 4) {
    const uint64_t four = load_wholes(from + i);
    if (is_by_fours(p)) {
      to[i / 4 * kWordRows] = low_bytes(four);
      continue;
    }
    to[i / 2 * kWordRows] = uint32_t(four & 0xffff) | uint32_t(four >> 16 & 0xffff0000);
    to[(i / 2 + 1) * kWordRows] = uint32_t(four >> 16 & 0xffff) | uint32_t(four >> 32 & 0xffff0000);
  }
}

inline uint32_t largest_of(WordVec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_epu32(bit_cast<__m512i>(v));
#else
  uint32_t most = 0;
  for (int i = 0; i < kWidth; ++i) most = v[i] > most ? v[i] : most;
  return most;
#endif
}

// Writes `count` numbers as 16-bit integers of at most `max_whole`; returns the scale.
inline float round_to_wholes(const PanelElement* from, int64_t count, float max_whole, char* to) {
  // Adding 1.5 * 2^23 rounds to an integer, which then stands in the low bits.
  const Vec magic = broadcast(12582912.0f);
  const uint32_t infinity = 0x7f800000;
  // Bits of positive numbers are in their order, above them an infinity's, then a NaN's.
  WordVec most = {};
  for (int64_t i = 0; i < count; i += kWidth) {
    const WordVec bits = bit_cast<WordVec>(load(from + i)) & 0x7fffffff;
    most = bits > most ? bits : most;
  }
  const uint32_t bits = largest_of(most);
  const float largest = bit_cast<float>(bits);
  // The smallest numbers have no finite factor: they are zero beside any weight.
  const float factor = max_whole / largest;
  const bool has_scale = bits > 0 && bits < infinity && factor < 3e38f;
  for (int64_t i = 0; i < count; i += kWidth) {
    const Vec x = has_scale ? multiply_add(load(from + i), broadcast(factor), magic) : magic;
    const HalfVec whole = __builtin_convertvector(bit_cast<WordVec>(x), HalfVec);
    __builtin_memcpy(to + 2 * i, &whole, sizeof(whole));
  }
  // NaN and infinity make the whole row NaN, since infinity times zero is NaN.
  return bits < infinity ? largest / max_whole : __builtin_inff();
}

// Writes rows begin to end of the panel as integers, relative to the largest of their row or block.
void split_wholes(const Product& p, int64_t begin, int64_t end) {
  const Wholes w = wholes_of(p);
  for (int64_t row = begin; row < end; ++row) {
    const PanelElement* from = (const PanelElement*)p.panel + row * p.panel_stride;
    char* to = (char*)(w.wholes + row * p.num_inputs);
    if (has_byte_rows(p))
      for (int64_t input = 0; input < p.num_inputs; input += kBlockInputs) {
        const float scale =
            round_to_wholes(from + input, kBlockInputs, kMaxByte, to + 2 * input);
        for (int64_t i = 0; i < kBlockInputs; i += w.step_inputs)
          w.scales[w.at(row, (input + i) / w.step_inputs)] = scale;
      }
    else
      w.row_scales[row] = round_to_wholes(from, p.num_inputs, kMaxWhole, to);
    sum_steps(p, w, row);
    if (p.num_rows <= kDigitsRows) write_digits(p, w, row);
    else write_words(p, w, row);
  }
}

}  // namespace
