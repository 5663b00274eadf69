// Weights into tiles, an output group at a time: one pass, which stays in the cache.
//
// The layout is that of products.h and of model/weights/tile_layout.py, the rounding that of
// model/weights/round_integers.py, to the bit. Values that are not finite get a scale of NaN.
#pragma once

#include <cstddef>

#include "packing_search.h"

namespace {

using octavo::kTileOutputs;
using octavo::Packing;

// A tile has this many lines, of a word of each output.
constexpr int kTileWords = 16;
constexpr int kLineBytes = 4 * kTileOutputs;
constexpr int kCodesOfTile = 4 * kTileWords, kValuesOfTile = 2 * kTileWords;
// Codes that are rounded before they are arranged: whole tiles and whole groups of inputs.
constexpr int kRoundedInputs = 128;

// `from`: of each output the words of its inputs, `stride` bytes after each other.
inline void transpose_words(const uint8_t* from, int64_t stride, uint8_t* to) {
  uint32_t lines[kTileWords][kTileOutputs];
  for (int output = 0; output < kTileOutputs; ++output) {
    uint32_t words[kTileWords];
    __builtin_memcpy(words, from + output * stride, sizeof(words));
    for (int word = 0; word < kTileWords; ++word) lines[word][output] = words[word];
  }
  __builtin_memcpy(to, lines, sizeof(lines));
}

// ---- codes -------------------------------------------------------------------------------------

// Collects `digit_bits` of each code from bit `shift` on: several fours of inputs share a line.
inline uint8_t* store_digits(const uint8_t (*fours)[kLineBytes], int shift, int digit_bits,
                             uint8_t* to) {
  const int fours_of_line = 8 / digit_bits, mask = (1 << digit_bits) - 1;
  for (int first = 0; first < kTileWords; first += fours_of_line, to += kLineBytes)
    for (int i = 0; i < kLineBytes; ++i) {
      int line = 0;
      for (int four = 0; four < fours_of_line; ++four)
        line |= (fours[first + four][i] >> shift & mask) << four * digit_bits;
      to[i] = uint8_t(line);
    }
  return to;
}

// Arranges the codes of 16 outputs by 64 inputs.
inline void store_codes(const uint8_t* codes, int64_t stride, int64_t bits, uint8_t* tile) {
  if (bits == 8) return transpose_words(codes, stride, tile);
  uint8_t fours[kTileWords][kLineBytes];
  transpose_words(codes, stride, fours[0]);
  tile = store_digits(fours, 0, 4, tile);
  if (bits == 5) store_digits(fours, 4, 1, tile);
  if (bits == 6) store_digits(fours, 4, 2, tile);
}

inline int64_t tile_bytes(const Packing& p) { return kTileWords * kLineBytes * p.bits / 8; }

bool pack_codes(const Packing& p) {
  uint8_t codes[kTileOutputs][kCodesOfTile];
  uint8_t* tile = (uint8_t*)p.tiles;
  for (int64_t first = 0; first < p.num_rows; first += kTileOutputs)
    for (int64_t start = 0; start < p.num_tiles * kCodesOfTile; start += kCodesOfTile) {
      for (int output = 0; output < kTileOutputs; ++output) {
        const int64_t row = first + output, rest = row < p.num_rows ? p.num_inputs - start : 0;
        const int count = int(rest < kCodesOfTile ? rest : kCodesOfTile);
        const uint8_t* from = (const uint8_t*)p.rows + row * p.row_stride + start;
        // Codes are added in eight bits, so that -8 + 8 is 0.
        for (int i = 0; i < count; ++i) codes[output][i] = uint8_t(from[i] + p.code_offset);
        for (int i = larger(count, 0); i < kCodesOfTile; ++i)
          codes[output][i] = uint8_t(p.code_offset);
      }
      store_codes(codes[0], kCodesOfTile, p.bits, tile);
      tile += tile_bytes(p);
    }
  return true;
}

// ---- rounding ----------------------------------------------------------------------------------

// Rounds inputs that share a scale, `count` of them present, and returns the scale.
template <class T>
float round_group(const T* from, int64_t count, const Packing& p, uint8_t* codes) {
  float values[kRoundedInputs], lanes[kWidth];
  Vec largest = {}, rest = {};
  for (int64_t i = 0; i < p.group_inputs; i += kWidth) {
    const Vec x = load_some(from + i, count - i);
    store(values + i, x);
    largest = max(bit_cast<Vec>(bit_cast<IntVec>(x) & 0x7fffffff), largest);
    // Zero, or NaN for infinities and NaN.
    rest += x - x;
  }
  const float fault = sum(rest);
  if (fault != 0.0f) {
    __builtin_memset(codes, int(p.code_offset), size_t(p.group_inputs));
    return fault;
  }
  const float most = float((1 << (p.bits - 1)) - 1);
  float reach = 0.0f;
  store(lanes, largest);
  for (float one : lanes) reach = one > reach ? one : reach;
  const float quotient = reach / most;
  const float scale = to_half_if_normal(quotient > 1e-30f ? quotient : 1e-30f);
  for (int64_t i = 0; i < p.group_inputs; i += kWidth) {
    const Vec quotients = load(values + i) / broadcast(scale);
    const Vec bounded = min(broadcast(most), max(broadcast(-most), quotients));
    store_integers(codes + i, to_integers(bounded), int32_t(p.code_offset));
  }
  return scale;
}

// Rounds a row's inputs from `start` on. Groups behind its end have no scale.
template <class T>
bool round_inputs(const Packing& p, int64_t row, int64_t start, uint8_t* codes) {
  const int64_t num_groups = (p.num_inputs + p.group_inputs - 1) / p.group_inputs;
  const T* from = (const T*)p.rows + row * p.row_stride;
  bool is_finite = true;
  for (int64_t at = start; at < start + kRoundedInputs; at += p.group_inputs) {
    if (at >= p.num_inputs) {
      __builtin_memset(codes + at - start, int(p.code_offset), size_t(p.group_inputs));
      continue;
    }
    const int64_t group = row * num_groups + at / p.group_inputs, count = p.num_inputs - at;
    float& scale = p.scales[group];
    if (p.minimums)
      scale = search_group(from + at, count, codes + at - start, p.minimums[group]);
    else
      scale = round_group(from + at, count, p, codes + at - start);
    is_finite &= scale == scale;
  }
  return is_finite;
}

template <class T>
bool round_rows(const Packing& p) {
  uint8_t codes[kTileOutputs][kRoundedInputs];
  uint8_t* tile = (uint8_t*)p.tiles;
  bool is_finite = true;
  for (int64_t first = 0; first < p.num_rows; first += kTileOutputs)
    for (int64_t start = 0; start < p.num_tiles * kCodesOfTile; start += kRoundedInputs) {
      for (int output = 0; output < kTileOutputs; ++output) {
        if (first + output < p.num_rows)
          is_finite &= round_inputs<T>(p, first + output, start, codes[output]);
        else
          __builtin_memset(codes[output], int(p.code_offset), kRoundedInputs);
      }
      for (int at = 0; at < kRoundedInputs && start + at < p.num_tiles * kCodesOfTile;
           at += kCodesOfTile, tile += tile_bytes(p))
        store_codes(codes[0] + at, kRoundedInputs, p.bits, tile);
    }
  return is_finite;
}

// ---- bfloat16 ----------------------------------------------------------------------------------

// To the nearest, ties to even. The instruction for it makes subnormal numbers zero.
inline HalfVec to_bfloat16(Vec x) {
  const WordVec word = bit_cast<WordVec>(x);
  const WordVec rounded = (word + 0x7fff + ((word >> 16) & 1)) >> 16;
  return __builtin_convertvector(x == x ? rounded : ((word >> 16) | 0x40), HalfVec);
}

template <class T>
bool pack_floats(const Packing& p) {
  uint16_t values[kTileOutputs][kValuesOfTile];
  uint8_t* tile = (uint8_t*)p.tiles;
  Vec rest = {};
  for (int64_t first = 0; first < p.num_rows; first += kTileOutputs)
    for (int64_t start = 0; start < p.num_tiles * kValuesOfTile; start += kValuesOfTile) {
      for (int output = 0; output < kTileOutputs; ++output) {
        const int64_t row = first + output, count = row < p.num_rows ? p.num_inputs - start : 0;
        const T* from = (const T*)p.rows + row * p.row_stride + start;
        for (int i = 0; i < kValuesOfTile; i += kWidth) {
          const Vec x = load_some(from + i, count - i);
          rest += x - x;
          const HalfVec half = to_bfloat16(x);
          __builtin_memcpy(values[output] + i, &half, sizeof(half));
        }
      }
      transpose_words((const uint8_t*)values[0], sizeof(values[0]), tile);
      tile += kTileWords * kLineBytes;
    }
  return sum(rest) == 0.0f;
}

// ---- all of them -------------------------------------------------------------------------------

template <class T>
bool pack_of(const Packing& p) {
  return p.bits == 16 ? pack_floats<T>(p) : round_rows<T>(p);
}

bool pack(const Packing& p) {
  if (p.bits < 16 && !p.scales) return pack_codes(p);
  switch (p.dtype) {
    case kFloat16: return pack_of<Float16>(p);
    case kBFloat16: return pack_of<BFloat16>(p);
    default: return pack_of<float>(p);
  }
}

}  // namespace
