// Matrix products with packed weights: rows of activations times [n, k] weights.
//
// A tile is 16 outputs by 32 inputs of bfloat16, or by 64 of codes. Pairs (or fours) of inputs stand
// side by side, each for the 16 outputs: the layout of AMX's second operand. Tiles of one output group
// follow each other along k, so a thread reads memory in one direction.
//
// Codes are integers of 4, 5, 6 or 8 bits with a scale, and perhaps a minimum, for each output and
// group of inputs. A tile of 8 bits is [16 fours, 16 outputs, 4]. Below 8 bits a byte holds the low
// four bits of two fours: of the even one in its low half, of the odd one in its high half; the other
// bits follow: two bits of four fours, or one bit of eight fours, to a byte.
//
// A row's result does not depend on the rows beside it: every output is one sum in the order of k,
// whatever the blocking.
#pragma once

#include "simd.h"

namespace {

using octavo::Product;
using octavo::Weights;
using octavo::kByteTileInputs;
using octavo::kTileInputs;
using octavo::kTileOutputs;

constexpr int kTileElements = kTileOutputs * kTileInputs;
constexpr int kByteTileElements = kTileOutputs * kByteTileInputs;
// Output groups that are multiplied side by side.
constexpr int kMaxSide = 4;

// The output group at `side`, counted from `first`. Gates and the values they multiply are the two
// halves of the outputs; their groups alternate, and `first` counts pairs.
inline int64_t group_at(const Product& p, int64_t first, int side) {
  if (!p.is_gated) return first + side;
  return first + side / 2 + side % 2 * (p.num_outputs / 2 / kTileOutputs);
}

// Of 64 inputs.
inline int64_t tile_bytes(int64_t bits) { return kByteTileElements * bits / 8; }

// The first tile of an output group.
inline const char* tiles_of(const Product& p, int64_t output_group) {
  const int64_t bytes = p.num_inputs / kByteTileInputs * tile_bytes(p.weights.bits);
  return (const char*)p.weights.tiles + output_group * bytes;
}

inline int64_t num_scales(const Product& p) {
  return (p.num_inputs + p.weights.group_inputs - 1) / p.weights.group_inputs;
}

// ---- writing finished sums ---------------------------------------------------------------------

inline Vec silu(Vec x) { return x / (1.0f + exp2(x * -1.44269504f)); }

inline Vec scale_of(const float* row_scales, int64_t row) {
  return broadcast(row_scales ? row_scales[row] : 1.0f);
}

// `sums` is [rows, stride]: `side` output groups from `group` on, rows from `row` on. `row_scales` may be
// null.
inline void finish_gated(const Product& p, const float* sums, int stride, int64_t pair, int side,
                         int64_t row, int rows, const float* row_scales) {
  for (int r = 0; r < rows; ++r, sums += stride) {
    const Vec scale = scale_of(row_scales, row + r);
    for (int s = 0; s < side; s += 2) {
      const int64_t at = (row + r) * p.out_stride + (pair + s / 2) * kTileOutputs;
      for (int i = 0; i < kTileOutputs; i += kWidth) {
        Vec gate = load(sums + s * kTileOutputs + i) * scale;
        Vec up = load(sums + (s + 1) * kTileOutputs + i) * scale;
        if (p.weights.bias) {
          gate += load(p.weights.bias + group_at(p, pair, s) * kTileOutputs + i);
          up += load(p.weights.bias + group_at(p, pair, s + 1) * kTileOutputs + i);
        }
        store_some(p.out, p.out_dtype, at + i, silu(gate) * up, kWidth);
      }
    }
  }
}

inline void finish(const Product& p, const float* sums, int stride, int64_t group, int side,
                   int64_t row, int rows, const float* row_scales = nullptr) {
  if (p.is_gated) return finish_gated(p, sums, stride, group, side, row, rows, row_scales);
  const int64_t first = group * kTileOutputs, left = p.num_outputs - first;
  const int64_t count = left < side * kTileOutputs ? left : side * kTileOutputs;
  for (int r = 0; r < rows; ++r, sums += stride) {
    float* out = (float*)p.out + (row + r) * p.out_stride + first;
    const Vec scale = scale_of(row_scales, row + r);
    for (int64_t i = 0; i < count; i += kWidth) {
      Vec x = load(sums + i) * scale;
      if (p.weights.bias) x += load(p.weights.bias + first + i);
      if (p.is_added) x += load_some(out + i, count - i);
      store_some(out + i, x, count - i);
    }
  }
}

// ---- blocking ----------------------------------------------------------------------------------

// Output groups begin to end, of all rows; pairs of groups where they are gated. `multiply` computes
// up to `max_side` groups side by side: 1, 2 or 4.
template <class Multiply>
inline void product_by(const Multiply& multiply, int max_side, const Product& p, int64_t begin,
                       int64_t end) {
  const int each = p.is_gated ? 2 : 1;
  while (begin < end) {
    const int64_t left = (end - begin) * each;
    const int side = left >= 4 && max_side == 4 ? 4 : left >= 2 && max_side >= 2 ? 2 : each;
    multiply(side, begin);
    begin += side / each;
  }
}

}  // namespace

#include "products_vectors.h"
#if defined(__AMX_BF16__)
#include "products_amx.h"
#else
namespace {
inline void configure_tiles() {}
inline void release_tiles() {}
}  // namespace
#endif

namespace {

void product(const Product& p, int64_t begin, int64_t end, float* scratch) {
#if defined(__AMX_BF16__)
  if (is_by_matrix(p)) return product_by_matrix(p, begin, end, scratch);
#endif
  product_by_vectors(p, begin, end, scratch);
}

int64_t product_scratch_floats() { return kVectorScratchFloats; }

int64_t split_bytes(int64_t rows, int64_t num_inputs) {
#if defined(__AMX_BF16__)
  const int64_t digits = digits_bytes(rows, num_inputs), wholes = wholes_bytes(rows, num_inputs);
  return digits > wholes ? digits : wholes;
#else
  return wholes_bytes(rows, num_inputs);
#endif
}

void split_rows(const Product& p, int64_t begin, int64_t end) {
#if defined(__AMX_BF16__)
  if (is_by_matrix(p)) return split_digits(p, begin, end);
#endif
  split_wholes(p, begin, end);
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
