// Prefill by matrix instructions: the tile of attention_prefill.h with bfloat16 operands.
//
// The same orientation: (token, head) pairs are the lanes. Keys are the first operand of the scores
// as they lie; the values' is the second's transpose. Sums stay in float32.
//
// Decode is the same code with the heads of one token as lanes, and both go through the keys in the
// same chunks and tiles, counted from the sequence's first: so a token's result is the same to the
// bit, whether it was computed alone, in a prompt, or in any piece of one.
#pragma once

#include "products.h"

#if defined(__AMX_BF16__)

namespace {

using octavo::kPrefillKeys;
using octavo::kPrefillLanes;

constexpr int kLaneTiles = kPrefillLanes / kTileOutputs;

// What one unit needs beside its scores: everything in bfloat16, as tiles want it.
struct TileScratch {
  // [head_dim / 32, lane tiles, 16 pairs, 16 lanes, 2].
  BFloat16* queries;
  // [keys, padded head_dim].
  BFloat16* keys;
  // [head_dim, keys].
  BFloat16* values;
  // [keys / 32, lane tiles, 16 pairs, 16 lanes, 2].
  BFloat16* weights;
  // [head_dim, lanes] floats: of the chunks of keys that are done.
  float* totals;

  static int padded(int head_dim) { return (head_dim + kTileInputs - 1) / kTileInputs * kTileInputs; }

  TileScratch(float* at, int head_dim)
      : queries((BFloat16*)at),
        keys(queries + padded(head_dim) * kPrefillLanes),
        values(keys + padded(head_dim) * kPrefillKeys),
        weights(values + head_dim * kPrefillKeys),
        totals((float*)(weights + kPrefillKeys * kPrefillLanes)) {}

  static int64_t floats(int head_dim) {
    return (int64_t(padded(head_dim)) * (kPrefillLanes + kPrefillKeys) +
            int64_t(head_dim) * kPrefillKeys + kPrefillKeys * kPrefillLanes) / 2 +
           int64_t(head_dim) * kPrefillLanes;
  }
};

// Two rows of floats side by side as pairs of bfloat16.
inline void store_pairs(BFloat16* to, Vec even, Vec odd) {
  const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(bit_cast<__m512>(even)));
  const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(bit_cast<__m512>(odd)));
  _mm512_storeu_si512(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}

// Rows [depth, lanes] of floats as second operands; rows from `count` on are zeros.
inline void pack_lanes(const float* rows, int count, int depth, int num_lanes, BFloat16* to) {
  for (int row = 0; row < depth; row += 2)
    for (int lane = 0; lane < num_lanes; lane += kTileOutputs) {
      const Vec even = row < count ? load(rows + row * kPrefillLanes + lane) : Vec{};
      const Vec odd = row + 1 < count ? load(rows + (row + 1) * kPrefillLanes + lane) : Vec{};
      const int tile = row / kTileInputs * kLaneTiles + lane / kTileOutputs;
      store_pairs(to + tile * kTileElements + row % kTileInputs * kTileOutputs, even, odd);
    }
}

// Sixteen rows of sixteen words, transposed.
inline void transpose(__m512i rows[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    rows[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    rows[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    rows[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    rows[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 16; j += 8) {
      t[i + j] = _mm512_shuffle_i32x4(rows[i + j], rows[i + j + 4], 0x88);
      t[i + j + 4] = _mm512_shuffle_i32x4(rows[i + j], rows[i + j + 4], 0xdd);
    }
  for (int i = 0; i < 8; ++i) {
    rows[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    rows[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
}

inline void load_keys(const void* pages, DType dtype, const int64_t* offsets, int num_keys,
                      int64_t head_offset, int head_dim, BFloat16* to) {
  const int stride = TileScratch::padded(head_dim);
  for (int key = 0; key < kPrefillKeys; ++key)
    for (int d = 0; d < stride; d += kWidth)
      store(to + key * stride + d,
            key < num_keys && d < head_dim
                ? load_some(pages, dtype, offsets[key] + head_offset + d, kWidth) : Vec{});
}

// To [head_dim, keys]: pairs of keys become words, which are transposed sixteen by sixteen.
inline void load_values(const void* pages, DType dtype, const int64_t* offsets, int num_keys,
                        int64_t head_offset, int head_dim, BFloat16* to) {
  const auto row = [&](int key, int d) {
    return key < num_keys ? load_some(pages, dtype, offsets[key] + head_offset + d, kWidth) : Vec{};
  };
  for (int key = 0; key < kPrefillKeys; key += 2 * kTileOutputs)
    for (int d = 0; d < head_dim; d += kTileOutputs) {
      __m512i words[16];
      for (int i = 0; i < 16; ++i) {
        alignas(64) BFloat16 pairs[32];
        store_pairs(pairs, row(key + 2 * i, d), row(key + 2 * i + 1, d));
        words[i] = _mm512_load_si512(pairs);
      }
      transpose(words);
      for (int i = 0; i < 16; ++i)
        _mm512_storeu_si512(to + (d + i) * kPrefillKeys + key, words[i]);
    }
}

// out[row][lane] (+)= first[row][depth] * second[depth][lane] for 16 rows and 16 or all lanes.
inline void multiply_lanes(const BFloat16* first, int64_t stride, const BFloat16* second, int depth,
                           bool is_added, bool is_narrow, float* out) {
  constexpr int64_t bytes = kPrefillLanes * sizeof(float);
  written_before();
  if (is_added) {
    _tile_loadd(0, out, bytes);
    if (!is_narrow) {
      _tile_loadd(1, out + kTileOutputs, bytes);
      _tile_loadd(2, out + 2 * kTileOutputs, bytes);
      _tile_loadd(3, out + 3 * kTileOutputs, bytes);
    }
  } else {
    zero_accumulators();
  }
  for (int k = 0; k < depth; k += kTileInputs, second += kLaneTiles * kTileElements) {
    _tile_loadd(4, first + k, stride * sizeof(BFloat16));
    _tile_loadd(5, second, 64);
    _tile_dpbf16ps(0, 4, 5);
    if (is_narrow) continue;
    _tile_loadd(6, second + kTileElements, 64);
    _tile_loadd(7, second + 2 * kTileElements, 64);
    _tile_dpbf16ps(1, 4, 6);
    _tile_loadd(5, second + 3 * kTileElements, 64);
    _tile_dpbf16ps(2, 4, 7);
    _tile_dpbf16ps(3, 4, 5);
  }
  _tile_stored(0, out, bytes);
  if (is_narrow) return;
  _tile_stored(1, out + kTileOutputs, bytes);
  _tile_stored(2, out + 2 * kTileOutputs, bytes);
  _tile_stored(3, out + 3 * kTileOutputs, bytes);
}

}  // namespace

#endif
