// Rows of packed weights as float32: the look-up of an embedding that shares the weights of a product.
#pragma once

#include "products.h"

namespace {

// The 64 codes of one output of a tile, to `to`.
inline void read_codes(const Weights& w, const char* tile, int64_t output, float* to) {
  const int bits = int(w.bits), high_bits = bits - 4;
  for (int four = 0; four < kByteTileInputs / 4; ++four) {
    const auto line = [&](int at) { return (const uint8_t*)tile + (at * kTileOutputs + output) * 4; };
    for (int i = 0; i < 4; ++i, ++to) {
      if (bits == 8) {
        *to = float(int8_t(line(four)[i]));
        continue;
      }
      int code = line(four / 2)[i] >> four % 2 * 4 & 15;
      if (high_bits) {
        const int fours = 8 / high_bits, shift = four % fours * high_bits;
        code |= (line(8 + four / fours)[i] >> shift & ((1 << high_bits) - 1)) << 4;
      }
      *to = float(code - int(w.code_offset));
    }
  }
}

inline void scale_codes(const Product& p, int64_t row, int64_t first_input, float* values) {
  const Weights& w = p.weights;
  const DType dtype = DType(w.scale_dtype);
  for (int i = 0; i < kByteTileInputs; ++i) {
    const int64_t scale = (first_input + i) / w.group_inputs;
    const int64_t at = (row / kTileOutputs * num_scales(p) + scale) * kTileOutputs + row % kTileOutputs;
    values[i] *= load_some(w.scales, dtype, at, 1)[0];
    if (w.minimums) values[i] += load_some(w.minimums, dtype, at, 1)[0];
  }
}

inline void read_wide(const char* tiles, int64_t output, float* to) {
  const uint16_t* pairs = (const uint16_t*)tiles + output * 2;
  for (int i = 0; i < kByteTileInputs; ++i)
    to[i] = bit_cast<float>(uint32_t(pairs[i / 2 * kTileOutputs * 2 + i % 2]) << 16);
}

// Rows begin to end of `rows` into `out` [rows, p.out_stride].
void look_up(const Product& p, const int64_t* rows, int64_t begin, int64_t end) {
  const int64_t bytes = tile_bytes(p.weights.bits);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t output = rows[i] % kTileOutputs;
    const char* tiles = tiles_of(p, rows[i] / kTileOutputs);
    for (int64_t input = 0; input < p.num_inputs; input += kByteTileInputs, tiles += bytes) {
      float values[kByteTileInputs];
      if (p.weights.bits == 16) read_wide(tiles, output, values);
      else read_codes(p.weights, tiles, output, values);
      if (p.weights.scales) scale_codes(p, rows[i], input, values);
      const int64_t left = p.out_stride - input;
      const int64_t count = left < kByteTileInputs ? left : kByteTileInputs;
      __builtin_memcpy((float*)p.out + i * p.out_stride + input, values, count * sizeof(float));
    }
  }
}

}  // namespace
