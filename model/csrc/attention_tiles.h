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
inline __m512i pairs_of(Vec even, Vec odd) {
  const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(bit_cast<__m512>(even)));
  const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(bit_cast<__m512>(odd)));
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

// Rows [depth, lanes] of floats as second operands; rows from `count` on are zeros.
inline void pack_lanes(const float* rows, int count, int depth, int num_lanes, BFloat16* to) {
  for (int row = 0; row < depth; row += 2)
    for (int lane = 0; lane < num_lanes; lane += kTileOutputs) {
      const Vec even = row < count ? load(rows + row * kPrefillLanes + lane) : Vec{};
      const Vec odd = row + 1 < count ? load(rows + (row + 1) * kPrefillLanes + lane) : Vec{};
      const int tile = row / kTileInputs * kLaneTiles + lane / kTileOutputs;
      _mm512_storeu_si512(to + tile * kTileElements + row % kTileInputs * kTileOutputs,
                          pairs_of(even, odd));
    }
}

// Sixteen rows of sixteen words, transposed.
inline void transpose(__m512i* rows) {
  __m512i t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 4) {
    rows[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    rows[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    rows[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    rows[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 4; ++i)
#pragma GCC unroll 16
    for (int j = 0; j < 16; j += 8) {
      t[i + j] = _mm512_shuffle_i32x4(rows[i + j], rows[i + j + 4], 0x88);
      t[i + j + 4] = _mm512_shuffle_i32x4(rows[i + j], rows[i + j + 4], 0xdd);
    }
#pragma GCC unroll 16
  for (int i = 0; i < 8; ++i) {
    rows[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    rows[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
}

// Where a tile's rows are; those past the last are of zeros.
template <class KV>
inline void locate_rows(const void* pages, const int64_t* offsets, int num_keys,
                        int64_t head_offset, const KV** rows) {
  alignas(64) static const KV zeros[octavo::kMaxHeadDim] = {};
  for (int key = 0; key < kPrefillKeys; ++key)
    rows[key] = key < num_keys ? (const KV*)pages + offsets[key] + head_offset : zeros;
}

template <class KV>
inline void load_keys(const KV* const* rows, int head_dim, BFloat16* to) {
  const int stride = TileScratch::padded(head_dim);
  for (int key = 0; key < kPrefillKeys; ++key, to += stride) {
    int d = 0;
    for (; d + 2 * kWidth <= head_dim; d += 2 * kWidth)
      store(to + d, load(rows[key] + d), load(rows[key] + d + kWidth));
    if (d < head_dim) store(to + d, load(rows[key] + d), Vec{});
  }
}

// To [head_dim, keys]: pairs of keys become words, which are transposed sixteen by sixteen.
template <class KV>
inline void load_values(const KV* const* rows, int head_dim, BFloat16* to) {
  for (int key = 0; key < kPrefillKeys; key += 2 * kTileOutputs)
    for (int d = 0; d < head_dim; d += kTileOutputs) {
      __m512i words[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i)
        words[i] = pairs_of(load(rows[key + 2 * i] + d), load(rows[key + 2 * i + 1] + d));
      transpose(words);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i)
        _mm512_storeu_si512(to + (d + i) * kPrefillKeys + key, words[i]);
    }
}

// Both of a tile, in bfloat16.
template <class KV>
void load_tile(const void* keys, const void* values, const int64_t* offsets, int num_keys,
               int64_t head_offset, int head_dim, const TileScratch& t) {
  const KV* rows[kPrefillKeys];
  locate_rows(keys, offsets, num_keys, head_offset, rows);
  load_keys(rows, head_dim, t.keys);
  locate_rows(values, offsets, num_keys, head_offset, rows);
  load_values(rows, head_dim, t.values);
}

// out[row][lane] (+)= first[row][depth] * second[depth][lane] for 16 rows and all lanes.
inline void multiply_lanes(const BFloat16* first, int64_t stride, const BFloat16* second, int depth,
                           bool is_added, float* out) {
  constexpr int64_t bytes = kPrefillLanes * sizeof(float);
  written_before();
  if (is_added) {
    _tile_loadd(0, out, bytes);
    _tile_loadd(1, out + kTileOutputs, bytes);
    _tile_loadd(2, out + 2 * kTileOutputs, bytes);
    _tile_loadd(3, out + 3 * kTileOutputs, bytes);
  } else {
    zero_accumulators();
  }
  for (int k = 0; k < depth; k += kTileInputs, second += kLaneTiles * kTileElements) {
    _tile_loadd(4, first + k, stride * sizeof(BFloat16));
    _tile_loadd(5, second, 64);
    _tile_loadd(6, second + kTileElements, 64);
    _tile_loadd(7, second + 2 * kTileElements, 64);
    _tile_dpbf16ps(0, 4, 5);
    _tile_loadd(5, second + 3 * kTileElements, 64);
    _tile_dpbf16ps(1, 4, 6);
    _tile_dpbf16ps(2, 4, 7);
    _tile_dpbf16ps(3, 4, 5);
  }
  _tile_stored(0, out, bytes);
  _tile_stored(1, out + kTileOutputs, bytes);
  _tile_stored(2, out + 2 * kTileOutputs, bytes);
  _tile_stored(3, out + 3 * kTileOutputs, bytes);
}

// The same for 64 rows and 16 lanes: four sums side by side hide each other's latency here too.
inline void multiply_few_lanes(const BFloat16* first, int64_t stride, const BFloat16* second,
                               int depth, bool is_added, float* out) {
  constexpr int64_t bytes = kPrefillLanes * sizeof(float);
  constexpr int64_t next = int64_t(kTileOutputs) * kPrefillLanes;
  const int64_t row_bytes = stride * sizeof(BFloat16), block = kTileOutputs * stride;
  written_before();
  if (is_added) {
    _tile_loadd(0, out, bytes);
    _tile_loadd(1, out + next, bytes);
    _tile_loadd(2, out + 2 * next, bytes);
    _tile_loadd(3, out + 3 * next, bytes);
  } else {
    zero_accumulators();
  }
  for (int k = 0; k < depth; k += kTileInputs, second += kLaneTiles * kTileElements) {
    _tile_loadd(5, second, 64);
    _tile_loadd(4, first + k, row_bytes);
    _tile_loadd(6, first + k + block, row_bytes);
    _tile_loadd(7, first + k + 2 * block, row_bytes);
    _tile_dpbf16ps(0, 4, 5);
    _tile_loadd(4, first + k + 3 * block, row_bytes);
    _tile_dpbf16ps(1, 6, 5);
    _tile_dpbf16ps(2, 7, 5);
    _tile_dpbf16ps(3, 4, 5);
  }
  _tile_stored(0, out, bytes);
  _tile_stored(1, out + next, bytes);
  _tile_stored(2, out + 2 * next, bytes);
  _tile_stored(3, out + 3 * next, bytes);
}

// Whichever suits, for `rows` rows, a multiple of 16.
inline void multiply_rows(const BFloat16* first, int64_t stride, const BFloat16* second, int depth,
                          int rows, bool is_added, bool is_narrow, float* out) {
  int row = 0;
  if (is_narrow)
    for (; row + 4 * kTileOutputs <= rows; row += 4 * kTileOutputs)
      multiply_few_lanes(first + row * stride, stride, second, depth, is_added,
                         out + row * kPrefillLanes);
  for (; row < rows; row += kTileOutputs)
    multiply_lanes(first + row * stride, stride, second, depth, is_added,
                   out + row * kPrefillLanes);
}

}  // namespace

#endif
