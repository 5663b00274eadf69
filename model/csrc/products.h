// Matrix products with weights in tiles: rows of activations times [n, k] weights.
//
// A tile is 16 outputs by 32 inputs, laid out as AMX wants its second operand: 16 pairs of inputs,
// each pair for the 16 outputs side by side. Tiles of one output group follow each other along k,
// so a thread reads memory in one direction. Eight-bit weights have the same order and a scale for
// each output and 64 inputs; they become bfloat16 on their way in, so both formats share one
// arithmetic. A row's result does not depend on the rows beside it: every output is one sum in
// the order of k, whatever the blocking.
#pragma once

#include "simd.h"

namespace {

using octavo::Product;
using octavo::kTileInputs;
using octavo::kTileOutputs;

constexpr int kTileElements = kTileOutputs * kTileInputs;
// Inputs that share a scale, and the tiles they are in.
constexpr int kGroupTiles = octavo::kGroupInputs / kTileInputs;
// Eight-bit tiles of one output group that are widened at a time, where the rows are few.
constexpr int kChunkTiles = 4;
// Rows that are multiplied before the next group of outputs.
constexpr int kBlockRows = 2 * kTileOutputs;
// Output groups side by side: what the accumulators have room for.
constexpr int kMaxSide = 4;

// Makes bfloat16 tiles of `count` eight-bit ones (a multiple of kGroupTiles).
inline void widen(const int8_t* from, const float* scales, int count, BFloat16* to) {
  for (int group = 0; group < count; group += kGroupTiles, scales += kTileOutputs) {
    float twice[kTileInputs];
    for (int i = 0; i < kTileInputs; ++i) twice[i] = scales[i / 2];
    // Read once: a store might be to where they stand, for all the compiler knows.
    Vec scale[kTileInputs / kWidth];
    for (int j = 0; j < kTileInputs / kWidth; ++j) scale[j] = load(twice + j * kWidth);
    for (int i = 0; i < kGroupTiles * kTileElements; i += kTileInputs)
      for (int j = 0; j < kTileInputs / kWidth; j += 2, from += 2 * kWidth, to += 2 * kWidth)
        store(to, load(from) * scale[j], load(from + kWidth) * scale[j + 1]);
  }
}

// The output group that stands at `side` of those from `first` on. Gates and what they are for are
// the halves of the outputs; they stand in turns, and `first` counts pairs.
inline int64_t group_at(const Product& p, int64_t first, int side) {
  if (!p.is_gated) return first + side;
  return first + side / 2 + side % 2 * (p.num_outputs / 2 / kTileOutputs);
}

// Where the tiles of one output group, from tile `first` on, are read.
inline const BFloat16* tiles_of(const Product& p, int64_t output_group, int first, int count,
                                BFloat16* widened) {
  const int64_t at = output_group * p.num_tiles + first;
  if (!p.scales) return (const BFloat16*)p.weights + at * kTileElements;
  widen((const int8_t*)p.weights + at * kTileElements, p.scales + at / kGroupTiles * kTileOutputs,
        count, widened);
  return widened;
}

// ---- what becomes of finished sums -------------------------------------------------------------

inline Vec silu(Vec x) { return x / (1.0f + exp2(x * -1.44269504f)); }

// `sums` is [rows, stride]: `side` output groups from `group` on, rows from `row` on.
inline void finish_gated(const Product& p, const float* sums, int stride, int64_t pair, int side,
                         int64_t row, int rows) {
  for (int r = 0; r < rows; ++r, sums += stride)
    for (int s = 0; s < side; s += 2) {
      const int64_t at = (row + r) * p.out_stride + (pair + s / 2) * kTileOutputs;
      for (int i = 0; i < kTileOutputs; i += kWidth) {
        Vec gate = load(sums + s * kTileOutputs + i);
        Vec up = load(sums + (s + 1) * kTileOutputs + i);
        if (p.bias) {
          gate += load(p.bias + group_at(p, pair, s) * kTileOutputs + i);
          up += load(p.bias + group_at(p, pair, s + 1) * kTileOutputs + i);
        }
        store_some(p.out, p.out_dtype, at + i, silu(gate) * up, kWidth);
      }
    }
}

inline void finish(const Product& p, const float* sums, int stride, int64_t group, int side,
                   int64_t row, int rows) {
  if (p.is_gated) return finish_gated(p, sums, stride, group, side, row, rows);
  const int64_t first = group * kTileOutputs, left = p.num_outputs - first;
  const int64_t count = left < side * kTileOutputs ? left : side * kTileOutputs;
  for (int r = 0; r < rows; ++r, sums += stride) {
    float* out = (float*)p.out + (row + r) * p.out_stride + first;
    for (int64_t i = 0; i < count; i += kWidth) {
      Vec x = load(sums + i);
      if (p.bias) x += load(p.bias + first + i);
      if (p.is_added) x += load_some(out + i, count - i);
      store_some(out + i, x, count - i);
    }
  }
}

// ---- the products ------------------------------------------------------------------------------

#if defined(__AMX_BF16__)

// The compiler does not know that a tile is loaded from memory, nor what a configuration does:
// everything stands where it is written.
inline void written_before() { asm volatile("" ::: "memory"); }

inline void configure_tiles() {
  alignas(64) struct {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } config;
  _tile_loadconfig(&config);
  written_before();
}

inline void release_tiles() { _tile_release(); }

inline void prefetch(const BFloat16* tile) {
  // Far enough ahead for memory, near enough for the first-level cache.
  constexpr int kAheadBytes = 8192;
  for (int line = 0; line < kTileElements * 2; line += 64)
    _mm_prefetch((const char*)tile + kAheadBytes + line, _MM_HINT_T0);
}

// One block of 16 rows and up to four output groups: accumulators 0 to 3.
template <int kSide>
inline void multiply_one(const BFloat16* a, int64_t a_bytes, const BFloat16* const* b, int count) {
  written_before();
  for (int t = 0; t < count; ++t, a += kTileInputs) {
    const int64_t at = int64_t(t) * kTileElements;
    _tile_loadd(4, a, a_bytes);
    prefetch(b[0] + at);
    _tile_loadd(5, b[0] + at, 64);
    _tile_dpbf16ps(0, 4, 5);
    if constexpr (kSide > 1) {
      prefetch(b[1] + at);
      _tile_loadd(6, b[1] + at, 64);
      _tile_dpbf16ps(1, 4, 6);
    }
    if constexpr (kSide > 2) {
      prefetch(b[2] + at);
      _tile_loadd(7, b[2] + at, 64);
      _tile_dpbf16ps(2, 4, 7);
    }
    if constexpr (kSide > 3) {
      prefetch(b[3] + at);
      _tile_loadd(5, b[3] + at, 64);
      _tile_dpbf16ps(3, 4, 5);
    }
  }
}

// Two blocks of 16 rows and two output groups: accumulators 0, 1 of the first rows, 2, 3.
inline void multiply_two(const BFloat16* a, int64_t a_bytes, const BFloat16* const* b, int count) {
  written_before();
  const BFloat16* below = (const BFloat16*)((const char*)a + kTileOutputs * a_bytes);
  for (int t = 0; t < count; ++t, a += kTileInputs, below += kTileInputs) {
    const int64_t at = int64_t(t) * kTileElements;
    _tile_loadd(4, a, a_bytes);
    _tile_loadd(5, below, a_bytes);
    _tile_loadd(6, b[0] + at, 64);
    _tile_loadd(7, b[1] + at, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}

inline void zero_accumulators() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

// The accumulators' sums, to [32, 4 * 16] floats.
constexpr int kSumsStride = kMaxSide * kTileOutputs;

inline void store_accumulators(float* sums, bool is_two) {
  constexpr int64_t bytes = kSumsStride * sizeof(float);
  float* below = sums + kTileOutputs * kSumsStride;
  _tile_stored(0, sums, bytes);
  _tile_stored(1, sums + kTileOutputs, bytes);
  _tile_stored(2, is_two ? below : sums + 2 * kTileOutputs, bytes);
  _tile_stored(3, is_two ? below + kTileOutputs : sums + 3 * kTileOutputs, bytes);
}

typedef BFloat16 PanelElement;

template <int kSide>
inline void multiply_block(const Product& p, const BFloat16* const* b, int first, int count,
                           int64_t row, int rows, int64_t group, float* sums) {
  const int64_t bytes = p.panel_stride * sizeof(BFloat16);
  const BFloat16* a = (const BFloat16*)p.panel + row * p.panel_stride + first * kTileInputs;
  const bool is_two = rows > kTileOutputs;
  if (first == 0) zero_accumulators();
  if (is_two) {
    const BFloat16* const pair[] = {b[0], b[kSide - 1]};
    multiply_two(a, bytes, pair, count);
  } else {
    multiply_one<kSide>(a, bytes, b, count);
  }
  if (first + count < p.num_tiles) return;
  store_accumulators(sums, is_two);
  finish(p, sums, kSumsStride, group, kSide, row, rows);
}

#else

// Without matrix instructions the rows come in float32, and a pair of inputs is two vectors of
// weights: the low half of each word, and the high one.
inline void configure_tiles() {}
inline void release_tiles() {}

typedef float PanelElement;

constexpr int kSumsStride = kMaxSide * kTileOutputs;
constexpr int kTileVecs = kTileOutputs / kWidth;
constexpr int kRowsAtOnce = kWidth == 16 ? 8 : 3;

template <int kRows>
inline void multiply_rows(const float* a, int64_t a_stride, const BFloat16* b, int count,
                          float* sums) {
  Vec even[kRows][kTileVecs] = {}, odd[kRows][kTileVecs] = {};
  for (int pair = 0; pair < count * kTileInputs / 2; ++pair, b += kTileInputs)
    for (int v = 0; v < kTileVecs; ++v) {
      const WordVec words = bit_cast<WordVec>(load((const float*)b + v * kWidth));
      const Vec low = bit_cast<Vec>(words << 16), high = bit_cast<Vec>(words & 0xffff0000u);
      for (int r = 0; r < kRows; ++r) {
        even[r][v] += a[r * a_stride + 2 * pair] * low;
        odd[r][v] += a[r * a_stride + 2 * pair + 1] * high;
      }
    }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kTileVecs; ++v)
      store(sums + r * kSumsStride + v * kWidth, even[r][v] + odd[r][v]);
}

template <int kSide>
inline void multiply_block(const Product& p, const BFloat16* const* b, int first, int count,
                           int64_t row, int rows, int64_t group, float* sums) {
  const float* a = (const float*)p.panel + row * p.panel_stride;
  for (int side = 0; side < kSide; ++side) {
    float* to = sums + side * kTileOutputs;
    int r = 0;
    for (; r + kRowsAtOnce <= rows; r += kRowsAtOnce)
      multiply_rows<kRowsAtOnce>(a + r * p.panel_stride, p.panel_stride, b[side], count,
                                 to + r * kSumsStride);
    for (; r < rows; ++r)
      multiply_rows<1>(a + r * p.panel_stride, p.panel_stride, b[side], count,
                       to + r * kSumsStride);
  }
  finish(p, sums, kSumsStride, group, kSide, row, rows);
}

#endif

// All rows of `kSide` output groups. Eight-bit weights are widened once for all rows; where the
// rows are one block, chunk by chunk, so that the wide ones never leave the first-level cache.
template <int kSide>
inline void multiply_groups(const Product& p, int64_t group, BFloat16* widened, float* sums) {
#if defined(__AMX_BF16__)
  const bool is_chunked = p.scales && p.num_rows <= kBlockRows;
#else
  const bool is_chunked = false;
#endif
  const int chunk = is_chunked ? smaller(kChunkTiles, p.num_tiles) : p.num_tiles;
  for (int first = 0; first < p.num_tiles; first += chunk) {
    const int count = smaller(chunk, p.num_tiles - first);
    const BFloat16* b[kSide];
    for (int side = 0; side < kSide; ++side)
      b[side] = tiles_of(p, group_at(p, group, side), first, count,
                         widened + int64_t(side) * chunk * kTileElements);
    for (int64_t row = 0; row < p.num_rows; row += kBlockRows) {
      const int64_t left = p.num_rows - row;
      multiply_block<kSide>(p, b, first, count, row, left < kBlockRows ? int(left) : kBlockRows,
                            group, sums);
    }
  }
}

int64_t product_scratch_floats(int num_tiles) {
  return kBlockRows * kSumsStride + int64_t(kMaxSide) * num_tiles * kTileElements / 2;
}

// Output groups begin to end, of all rows; pairs of groups where they are gated.
void product(const Product& p, int64_t begin, int64_t end, float* scratch) {
  float* sums = scratch;
  BFloat16* widened = (BFloat16*)(scratch + kBlockRows * kSumsStride);
  const int each = p.is_gated ? 2 : 1;
  // With two blocks of rows there is room for two groups.
  const int64_t most = p.num_rows > kTileOutputs ? 2 : kMaxSide;
  while (begin < end) {
    const int64_t left = (end - begin) * each;
    if (left >= 4 && most == 4) {
      multiply_groups<4>(p, begin, widened, sums);
      begin += 4 / each;
    } else if (left >= 2) {
      multiply_groups<2>(p, begin, widened, sums);
      begin += 2 / each;
    } else {
      multiply_groups<1>(p, begin, widened, sums);
      begin += 1;
    }
  }
}

// Float32 rows begin to end into a panel.
void pack_rows(const float* x, int64_t width, void* panel, int64_t stride, int64_t begin,
               int64_t end) {
  for (int64_t row = begin; row < end; ++row)
    for (int64_t i = 0; i < width; i += kWidth)
      store_some((PanelElement*)panel + row * stride + i,
                 load_some(x + row * width + i, width - i), width - i);
}

DType panel_dtype() { return sizeof(PanelElement) == 4 ? kFloat32 : kBFloat16; }

}  // namespace
