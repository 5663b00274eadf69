// Sums by vectors, for any instruction set. Included by products.h.
//
// The rows come in float32, and a pair of inputs is two vectors of weights: the low half of each
// word, and the high one. Eight-bit weights are converted to bfloat16, once for all rows.
#pragma once

namespace {

inline void configure_tiles() {}
inline void release_tiles() {}

typedef float PanelElement;

// Eight-bit weights are multiplied by the panel as it is.
int64_t digits_bytes(int64_t, int64_t) { return 0; }
void split_rows(const Product&, int8_t*, float*, int64_t, int64_t) {}

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

inline WordVec rounded(Vec x) {
  const WordVec word = bit_cast<WordVec>(x);
  return word + 0x7fff + ((word >> 16) & 1);
}

// One output group's eight-bit tiles, as bfloat16 ones. Four inputs of an output are a word.
inline const BFloat16* widen(const Product& p, int64_t output_group, BFloat16* to) {
  const int8_t* from = byte_tiles_of(p, output_group);
  const float* scales = scales_of(p, output_group);
  float* words = (float*)to;
  for (int tile = 0; tile < byte_tiles(p); ++tile) {
    const float* at = scales + tile / p.scale_tiles * kTileOutputs;
    for (int four = 0; four < kByteTileInputs / 4; ++four, words += 2 * kTileOutputs)
      for (int v = 0; v < kTileVecs; ++v, from += 4 * kWidth) {
        const IntVec word = bit_cast<IntVec>(load((const float*)from));
        const Vec scale = load(at + v * kWidth);
        WordVec part[4];
        for (int i = 0; i < 4; ++i)
          part[i] = rounded(__builtin_convertvector((word << (24 - 8 * i)) >> 24, Vec) * scale);
        for (int i = 0; i < 4; i += 2)
          store(words + i / 2 * kTileOutputs + v * kWidth,
                bit_cast<Vec>((part[i] >> 16) | (part[i + 1] & 0xffff0000u)));
      }
  }
  return to;
}

template <int kSide>
inline void multiply_block(const Product& p, const BFloat16* const* b, int64_t row, int rows,
                           int64_t group, float* sums) {
  const float* a = (const float*)p.panel + row * p.panel_stride;
  for (int side = 0; side < kSide; ++side) {
    float* to = sums + side * kTileOutputs;
    int r = 0;
    for (; r + kRowsAtOnce <= rows; r += kRowsAtOnce)
      multiply_rows<kRowsAtOnce>(a + r * p.panel_stride, p.panel_stride, b[side], p.num_tiles,
                                 to + r * kSumsStride);
    for (; r < rows; ++r)
      multiply_rows<1>(a + r * p.panel_stride, p.panel_stride, b[side], p.num_tiles,
                       to + r * kSumsStride);
  }
  finish(p, sums, kSumsStride, group, kSide, row, rows);
}

// ---- for products.h ----------------------------------------------------------------------------

inline int max_side(const Product& p) { return p.num_rows > kTileOutputs ? 2 : kMaxSide; }

template <int kSide>
inline void multiply_groups(const Product& p, int64_t group, float* scratch) {
  BFloat16* widened = (BFloat16*)(scratch + kBlockRows * kSumsStride);
  const BFloat16* b[kSide];
  for (int side = 0; side < kSide; ++side, widened += int64_t(p.num_tiles) * kTileElements) {
    const int64_t output_group = group_at(p, group, side);
    b[side] = p.scales ? widen(p, output_group, widened) : wide_tiles(p, output_group);
  }
  for (int64_t row = 0; row < p.num_rows; row += kBlockRows) {
    const int64_t left = p.num_rows - row;
    multiply_block<kSide>(p, b, row, left < kBlockRows ? int(left) : kBlockRows, group, scratch);
  }
}

int64_t product_scratch_floats(int num_tiles) {
  return kBlockRows * kSumsStride + int64_t(kMaxSide) * num_tiles * kTileElements / 2;
}

}  // namespace
