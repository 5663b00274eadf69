// Matrix products with weights in tiles: rows of activations times [n, k] weights.
//
// A tile is 16 outputs by 32 inputs of bfloat16 or by 64 of eight bits, in the layout of AMX's
// second operand: pairs (or fours) of inputs, each for the 16 outputs side by side. Tiles of one
// output group follow each other along k, so a thread reads memory in one direction. Eight-bit
// weights have a scale for each output and `scale_tiles` tiles. A row's result does not depend on
// the rows beside it: every output is one sum in the order of k, whatever the blocking.
//
// This file is common to all instruction sets; the sums are products_amx.h's or
// products_vectors.h's.
#pragma once

#include "simd.h"

namespace {

using octavo::kByteTileInputs;
using octavo::kTileInputs;
using octavo::kTileOutputs;
using octavo::Product;

constexpr int kTileElements = kTileOutputs * kTileInputs;
constexpr int kByteTileElements = kTileOutputs * kByteTileInputs;
// Rows that are multiplied before the next group of outputs, and output groups side by side: what
// the accumulators have room for.
constexpr int kBlockRows = 2 * kTileOutputs;
constexpr int kMaxSide = 4;
// Sums are [kBlockRows, kSumsStride].
constexpr int kSumsStride = kMaxSide * kTileOutputs;

// The output group at `side`, counted from `first`. Gates and the values they multiply are the two
// halves of the outputs; their groups alternate, and `first` counts pairs.
inline int64_t group_at(const Product& p, int64_t first, int side) {
  if (!p.is_gated) return first + side;
  return first + side / 2 + side % 2 * (p.num_outputs / 2 / kTileOutputs);
}

inline int byte_tiles(const Product& p) { return p.num_tiles * kTileInputs / kByteTileInputs; }

inline const BFloat16* wide_tiles(const Product& p, int64_t output_group) {
  return (const BFloat16*)p.weights + output_group * p.num_tiles * kTileElements;
}

inline const int8_t* byte_tiles_of(const Product& p, int64_t output_group) {
  return (const int8_t*)p.weights + output_group * byte_tiles(p) * kByteTileElements;
}

inline const float* scales_of(const Product& p, int64_t output_group) {
  const int64_t num_scales = (byte_tiles(p) + p.scale_tiles - 1) / p.scale_tiles;
  return p.scales + output_group * num_scales * kTileOutputs;
}

// ---- writing finished sums ---------------------------------------------------------------------

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

}  // namespace

#if defined(__AMX_BF16__)
#include "products_amx.h"
#else
#include "products_vectors.h"
#endif

namespace {

// Output groups begin to end, of all rows; pairs of groups where they are gated.
void product(const Product& p, int64_t begin, int64_t end, float* scratch) {
  const int each = p.is_gated ? 2 : 1;
  const int most = max_side(p);
  while (begin < end) {
    const int64_t left = (end - begin) * each;
    const int side = left >= 4 && most == 4 ? 4 : left >= 2 ? 2 : 1;
    if (side == 4) multiply_groups<4>(p, begin, scratch);
    if (side == 2) multiply_groups<2>(p, begin, scratch);
    if (side == 1) multiply_groups<1>(p, begin, scratch);
    begin += side / each;
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
