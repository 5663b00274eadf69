// Rows of activations as integers, for weights that are integers. Included by products_vectors.h.
//
// Of 16 bits: x = row_scale * whole, relative to the largest of the row. The products take either pairs
// of wholes, or their two bytes apart, high and low: both give the same exact sums.
// Of 8 bits: x = block_scale * whole, relative to the largest of 32 inputs. The products take fours of
// bytes where there is an instruction for it, otherwise pairs of wholes.
#pragma once

#include "simd.h"

namespace {

#if defined(OCTAVO_BF16_PAIRS)
typedef BFloat16 PanelElement;
#else
typedef float PanelElement;
#endif

// Vectors of the 16 outputs of a group.
constexpr int kVecs = kTileOutputs / kWidth;

// Up to so many rows are multiplied by bytes without unpacking, where there is an instruction for it.
#if defined(__AVX512VNNI__)
constexpr int kDigitsRows = 8;
#elif defined(__AVXVNNI__)
constexpr int kDigitsRows = 2;
#else
constexpr int kDigitsRows = 0;
#endif
#if defined(OCTAVO_NEON_DOTPROD)
constexpr bool kHasByteProducts = true;
#else
constexpr bool kHasByteProducts = kDigitsRows > 0;
#endif

// Rows that are multiplied with codes at once. With six the sums
// stay in registers beside the integers that are added to them. Where a product takes two instructions,
// or there are 16 registers, all of them have integers. Four rows fill NEON's 32 short registers.
#if defined(__AVX512F__) && !defined(__AVX512VNNI__)
constexpr int kWordRows = 12;
#elif defined(OCTAVO_NEON)
constexpr int kWordRows = 4;
#else
constexpr int kWordRows = 6;
#endif
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

// Numbers of kSide rows stand side by side, a cache line of each: a thread that writes a row shares no
// line with others, and one address serves all rows. `numbers_each`, of a row, fill whole lines.
constexpr int kLineWords = 16;
template <int kSide>
inline int64_t line_at(int64_t row, int64_t index, int64_t numbers_each) {
  const int64_t first = row / kSide * kSide * numbers_each + row % kSide * kLineWords;
  return first + index + (index & -kLineWords) * (kSide - 1);
}

// Rows of integers as `split_wholes` writes them.
struct Wholes {
  // Inputs whose products are summed as integers: those of one scale, of weights and of rows.
  int64_t step_inputs;
  int64_t num_steps;
  // [rows, num_inputs]
  int16_t* wholes;
  // Pairs of wholes, or fours of bytes, in lines of kWordRows.
  int64_t num_words;
  uint32_t* words;
  // Fours of their high bytes, and of their low ones, in lines of kDigitsRows. Of bytes, high alone.
  int64_t num_fours;
  uint32_t* high;
  uint32_t* low;
  // [rows], of 16 bits.
  float* row_scales;
  // Three numbers of each step. Of rows of 8 bits their scale; the sum of the wholes times the offset
  // of the codes, where codes are bytes without a sign; the sum of the inputs (of 16 bits: before the
  // scale of the row). In lines of kDigitsRows where there are digits, else of kWordRows.
  int64_t steps_each;
  float* scales;
  int32_t* offsets;
  float* input_sums;

  int64_t step_at(int64_t row, int64_t step, bool has_digits) const {
    return has_digits ? line_at<larger(kDigitsRows, 1)>(row, step, steps_each)
                      : line_at<kWordRows>(row, step, steps_each);
  }
};

// The largest whole = 256 * high + low with both digits in -127 to 127.
constexpr float kMaxWhole = 127 * 256 + 127;
constexpr float kMaxByte = 127;
// Inputs that share a scale in rows of 8 bits.
constexpr int kBlockInputs = 32;
constexpr int kMinGroupInputs = 16;
// Room for the rows of the last block, of words or of digits.
constexpr int kRowsPadding = larger(kWordRows, kDigitsRows);

inline int64_t whole_lines(int64_t count) {
  return (count + kLineWords - 1) / kLineWords * kLineWords;
}

inline int64_t wholes_bytes(int64_t rows, int64_t num_inputs) {
  const int64_t padded = whole_lines(rows + kRowsPadding);
  const int64_t words = num_inputs + 1 + 3 * whole_lines(num_inputs / kMinGroupInputs);
  return (padded * words + kDigitsRows * num_inputs / 2) * 4;
}

inline bool has_byte_rows(const Product& p) { return p.weights.activation_bits == 8; }
// Whether the words of rows are fours of bytes.
inline bool is_by_fours(const Product& p) { return kHasByteProducts && has_byte_rows(p); }

inline Wholes wholes_of(const Product& p) {
  const int64_t rows = whole_lines(p.num_rows + kRowsPadding);
  Wholes w;
  w.step_inputs = p.weights.group_inputs;
  if (has_byte_rows(p) && w.step_inputs > kBlockInputs) w.step_inputs = kBlockInputs;
  w.num_steps = (p.num_inputs + w.step_inputs - 1) / w.step_inputs;
  w.num_words = p.num_inputs / (is_by_fours(p) ? 4 : 2);
  w.num_fours = p.num_inputs / 4;
  w.steps_each = whole_lines(w.num_steps);
  w.wholes = (int16_t*)p.split;
  w.words = (uint32_t*)(w.wholes + rows * p.num_inputs);
  w.high = w.words + rows * p.num_inputs / 2;
  w.low = w.high + kDigitsRows * p.num_inputs / 4;
  w.row_scales = (float*)(w.low + kDigitsRows * p.num_inputs / 4);
  w.scales = w.row_scales + rows;
  w.offsets = (int32_t*)(w.scales + rows * w.steps_each);
  w.input_sums = (float*)(w.offsets + rows * w.steps_each);
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
    const int64_t at = w.step_at(row, step, p.num_rows <= kDigitsRows);
    w.offsets[at] = byte_offset(p.weights) * total;
    w.input_sums[at] = float(total) * (has_byte_rows(p) ? w.scales[at] : 1.0f);
  }
}

inline void write_digits(const Product& p, const Wholes& w, int64_t row) {
  constexpr int kBytes = kLineWords * 4;
  const int16_t* from = w.wholes + row * p.num_inputs;
  for (int64_t word = 0; word < w.num_fours; word += kLineWords, from += kBytes) {
    const int64_t at = line_at<larger(kDigitsRows, 1)>(row, word, w.num_fours);
    int8_t *high = (int8_t*)(w.high + at), *low = (int8_t*)(w.low + at);
    if (has_byte_rows(p)) {
      for (int i = 0; i < kBytes; ++i) high[i] = int8_t(from[i]);
      continue;
    }
    for (int i = 0; i < kBytes; ++i) high[i] = int8_t((from[i] + 128) >> 8);
    // The remainder after 256 * high is the low byte, with a sign.
    for (int i = 0; i < kBytes; ++i) low[i] = int8_t(from[i]);
  }
}

#if defined(OCTAVO_NEON_DOTPROD)
// Writes a line of wholes, eight by eight: their high bytes and then their low ones.
inline void write_line(const int16_t* from, uint32_t* to) {
  for (int i = 0; i < kLineWords; i += 4) {
    const int16x8_t wholes = vld1q_s16(from + 2 * i);
    vst1q_s8((int8_t*)(to + i), vcombine_s8(vrshrn_n_s16(wholes, 8), vmovn_s16(wholes)));
  }
}
#else
// The two inner numbers of each four change places: unpacked codes are pairs of every other one.
inline WordVec swap_inner(WordVec words) {
  typedef uint64_t LongVec __attribute__((vector_size(kWidth * 4)));
  const LongVec fours = bit_cast<LongVec>(words);
  return bit_cast<WordVec>((fours & 0xffff00000000ffffull) | (fours & 0xffff0000ull) << 16 |
                           (fours >> 16 & 0xffff0000ull));
}

// Writes a line of pairs of wholes.
inline void write_line(const int16_t* from, uint32_t* to) {
  for (int i = 0; i < kLineWords; i += kWidth)
    store_words(to + i, swap_inner(load_words(from + 2 * i)));
}
#endif

inline void write_words(const Product& p, const Wholes& w, int64_t row) {
  const int inputs = kLineWords * (is_by_fours(p) ? 4 : 2);
  const int16_t* from = w.wholes + row * p.num_inputs;
  for (int64_t word = 0; word < w.num_words; word += kLineWords, from += inputs) {
    uint32_t* to = w.words + line_at<kWordRows>(row, word, w.num_words);
    if (is_by_fours(p))
      for (int i = 0; i < kLineWords * 4; ++i) ((int8_t*)to)[i] = int8_t(from[i]);
    else
      write_line(from, to);
  }
}

inline uint32_t largest_of(WordVec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_epu32(bit_cast<__m512i>(v));
#elif defined(OCTAVO_NEON)
  return vmaxvq_u32(bit_cast<uint32x4_t>(v));
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
        for (int64_t step = input / w.step_inputs; step < (input + kBlockInputs) / w.step_inputs;
             ++step)
          w.scales[w.step_at(row, step, p.num_rows <= kDigitsRows)] = scale;
      }
    else
      w.row_scales[row] = round_to_wholes(from, p.num_inputs, kMaxWhole, to);
    sum_steps(p, w, row);
    if (p.num_rows <= kDigitsRows) write_digits(p, w, row);
    else write_words(p, w, row);
  }
}

}  // namespace
