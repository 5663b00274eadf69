// Whole pages to codes, as model/kv/page_codes.py defines them to the bit.
#pragma once

#include "attention_pages.h"
#include "page_write.h"

namespace {

// The scales of kWidth channels, as they are stored and as they divide.
struct EncodedScales {
  Vec minimum;
  Vec divisor;
  // Pairs of bfloat16: the scale in the lower half.
  WordVec pairs;
};

inline WordVec rounded_up(Vec x) {
  const WordVec word = bit_cast<WordVec>(x);
  return (bit_cast<IntVec>(x) < 0 ? word : word + 0xffff) & 0xffff0000;
}

inline IntVec are_finite(Vec x) { return (bit_cast<IntVec>(x) & INT32_MAX) < 0x7f800000; }

// Of channels with these smallest and largest numbers; `are_lost` where one of a channel is not finite.
template <int kBits>
inline EncodedScales scales_of(Vec least, Vec most, IntVec are_lost) {
  // Both roundings widen the range, so that no code lies outside. Adding zeros turns -0 into 0.
  const Vec minimum = -bit_cast<Vec>(rounded_up(-least)) + 0.0f;
  const Vec spread = most - minimum + 0.0f;
  const Vec scale = bit_cast<Vec>(rounded_up(spread / float((1 << kBits) - 1)));
  const IntVec is_sound = are_finite(spread) & ~are_lost;
  const WordVec words = (bit_cast<WordVec>(minimum) & 0xffff0000) | bit_cast<WordVec>(scale) >> 16;
  const IntVec divides = is_sound & (scale > 0.0f);
  return {bit_cast<Vec>(bit_cast<IntVec>(minimum) & is_sound),
          divides ? scale : Vec{} + __builtin_inff(),
          is_sound ? words : WordVec{} + kNoNumber};
}

// Keys: each channel over the tokens of the page.
template <int kBits>
void encode_keys(const Attention& a, const octavo::WholePage& whole, int head) {
  const int dim = a.head_dim, first = whole.index * a.page_size;
  const FullRows rows(a, whole.row, head, false);
  alignas(64) float least[octavo::kMaxHeadDim], most[octavo::kMaxHeadDim];
  alignas(64) int32_t top[octavo::kMaxHeadDim];
  for (int i = 0; i < a.page_size; ++i) {
    const FullRow row = rows.at(first + i);
    for (int d = 0; d < dim; d += kWidth) {
      const Vec x = row.load(d);
      const Vec magnitude = bit_cast<Vec>(bit_cast<IntVec>(x) & INT32_MAX);
      IntVec bits = bit_cast<IntVec>(magnitude);
      if (i) {
        const IntVec before = bit_cast<IntVec>(load((const float*)top + d));
        bits = bits > before ? bits : before;
      }
      store(least + d, i ? min(x, load(least + d)) : x);
      store(most + d, i ? max(x, load(most + d)) : x);
      store((float*)top + d, bit_cast<Vec>(bits));
    }
  }
  const int64_t page = a.block_table[whole.row * a.table_stride + whole.index];
  uint32_t* scales = (uint32_t*)a.key_scales + (page * a.num_kv_heads + head) * dim;
  for (int d = 0; d < dim; d += kWidth) {
    const IntVec are_lost = bit_cast<IntVec>(load((const float*)top + d)) >= 0x7f800000;
    const EncodedScales s = scales_of<kBits>(load(least + d), load(most + d), are_lost);
    __builtin_memcpy(scales + d, &s.pairs, sizeof(s.pairs));
    store(least + d, s.minimum);
    store(most + d, s.divisor);
  }
  uint8_t* to = (uint8_t*)a.keys + (page * a.page_size * a.num_kv_heads + head) * dim * kBits / 8;
  for (int i = 0; i < a.page_size; ++i, to += int64_t(a.num_kv_heads) * dim * kBits / 8) {
    const FullRow row = rows.at(first + i);
    uint8_t codes[octavo::kMaxHeadDim];
    for (int d = 0; d < dim; d += kWidth)
      store_steps<kBits>((row.load(d) - load(least + d)) / load(most + d), codes + d);
    pack_codes<kBits>(codes, dim, to);
  }
}

// Values: each token, in groups of its elements.
template <int kBits>
void encode_values(const Attention& a, const octavo::WholePage& whole, int head) {
  const int dim = a.head_dim, group = value_group(a), first = whole.index * a.page_size;
  const FullRows rows(a, whole.row, head, true);
  const int64_t page = a.block_table[whole.row * a.table_stride + whole.index];
  for (int i = 0; i < a.page_size; ++i) {
    const FullRow row = rows.at(first + i);
    const int64_t vector = (page * a.page_size + i) * a.num_kv_heads + head;
    alignas(64) float x[octavo::kMaxHeadDim];
    for (int d = 0; d < dim; d += kWidth) store(x + d, row.load(d));
    uint8_t* to = (uint8_t*)a.values + vector * dim * kBits / 8;
    uint16_t* scales = (uint16_t*)a.value_scales + 2 * vector * (dim / group);
    for (int d = 0; d < dim; d += group, scales += 2)
      encode_asymmetric<kBits>(x + d, group, to + d * kBits / 8, scales);
  }
}

void encode_page(const Attention& a, const octavo::WholePage& page, int32_t head) {
  if (a.kv_dtype == kKivi4)
    encode_keys<4>(a, page, head), encode_values<4>(a, page, head);
  else
    encode_keys<2>(a, page, head), encode_values<2>(a, page, head);
}

}  // namespace
