// Packed weights as words that are multiplied: see products_vectors.h, which includes this.
#pragma once

#include "products_rows.h"

namespace {

typedef int16_t ShortVec __attribute__((vector_size(kWidth * 4)));

// Bfloat16 pairs as two words of float32.
inline void widen(const char* tiles, int num_inputs, uint32_t* to) {
  for (int i = 0; i < num_inputs / 2 * kVecs; ++i) {
    const WordVec pair = load_words(tiles + int64_t(i) * kWidth * 4);
    uint32_t* at = to + i / kVecs * 2 * kTileOutputs + i % kVecs * kWidth;
    store_words(at, pair << 16);
    store_words(at + kTileOutputs, pair & 0xffff0000u);
  }
}

// Prefetch distance: far enough ahead for memory, near enough for the first cache.
constexpr int kAheadBytes = 4096;

// Fours that a loop body takes at once: no cut of a group falls within them.
constexpr int kFoursAtOnce = kMinGroupInputs / 4;

// One vector of fours of codes, a byte each. The four is the one at first + i of the tile, and `first`
// a multiple of kFoursAtOnce.
template <int kBits>
inline WordVec load_four(const char* tile, int first, int i, int v) {
  constexpr int kLineBytes = kTileOutputs * 4;
  const char* at = tile + v * kWidth * 4;
  if constexpr (kBits == 8) {
    return load_words(at + (first + i) * kLineBytes);
  } else {
    WordVec low = load_words(at + (first / 2 + i / 2) * kLineBytes);
    low = (i % 2 ? low >> 4 : low) & 0x0f0f0f0fu;
    if constexpr (kBits > 4) {
      constexpr int kHighBits = kBits - 4, kFours = 8 / kHighBits;
      const WordVec high = load_words(at + (8 + first / kFours) * kLineBytes);
      const uint32_t mask = kHighBits == 2 ? 0x03030303u : 0x01010101u;
      low |= ((high >> ((first % kFours + i) * kHighBits)) & mask) << 4;
    }
    return low;
  }
}

#if defined(OCTAVO_NEON)
// Writes fours of codes as two words, of their even and of their odd inputs: for `ShortWords` the
// first inputs of four outputs, then the second ones.
inline void store_pairs(WordVec fours, int code_offset, uint32_t* to) {
  const uint8x16_t order = {0, 4, 8, 12, 2, 6, 10, 14, 1, 5, 9, 13, 3, 7, 11, 15};
  const int8x16_t codes = vqtbl1q_s8(bit_cast<int8x16_t>(fours), order);
  const int16x8_t offset = vdupq_n_s16(int16_t(code_offset));
  vst1q_s16((int16_t*)to, vsubq_s16(vmovl_s8(vget_low_s8(codes)), offset));
  vst1q_s16((int16_t*)(to + kTileOutputs), vsubq_s16(vmovl_high_s8(codes), offset));
}
#endif

template <int kBits>
inline void unpack(const char* tiles, int num_inputs, int code_offset, uint32_t* to) {
  [[maybe_unused]] const uint32_t both = uint32_t(code_offset) << 16 | uint32_t(code_offset);
  for (; num_inputs > 0; num_inputs -= kByteTileInputs, tiles += tile_bytes(kBits)) {
    for (int line = 0; line < tile_bytes(kBits); line += 64)
      __builtin_prefetch(tiles + kAheadBytes + line);
#pragma GCC unroll 16
    for (int four = 0; four < kByteTileInputs / 4; ++four, to += 2 * kTileOutputs)
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) {
        const WordVec bytes = load_four<kBits>(tiles, four / kFoursAtOnce * kFoursAtOnce,
                                               four % kFoursAtOnce, v);
#if defined(OCTAVO_NEON)
        store_pairs(bytes, code_offset, to + v * kWidth);
#else
        const ShortVec codes = bit_cast<ShortVec>(bytes);
        ShortVec even, odd;
        if (kBits == 8) {
          even = codes << 8 >> 8;
          odd = codes >> 8;
        } else {
          const ShortVec offset = bit_cast<ShortVec>(WordVec{} + both);
          even = bit_cast<ShortVec>(bytes & 0x00ff00ffu) - offset;
          odd = bit_cast<ShortVec>(bytes >> 8 & 0x00ff00ffu) - offset;
        }
        store_words(to + v * kWidth, bit_cast<WordVec>(even));
        store_words(to + kTileOutputs + v * kWidth, bit_cast<WordVec>(odd));
#endif
      }
  }
}

// Codes as fours of bytes without a sign: 128 is added to those of eight bits.
template <int kBits>
inline void unpack_fours(const char* tiles, int num_inputs, uint32_t* to) {
  for (; num_inputs > 0; num_inputs -= kByteTileInputs, tiles += tile_bytes(kBits)) {
    for (int line = 0; line < tile_bytes(kBits); line += 64)
      __builtin_prefetch(tiles + kAheadBytes + line);
#pragma GCC unroll 16
    for (int four = 0; four < kByteTileInputs / 4; ++four, to += kTileOutputs)
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v)
        store_words(to + v * kWidth, load_four<kBits>(tiles, four / kFoursAtOnce * kFoursAtOnce,
                                                      four % kFoursAtOnce, v) ^ sign_flip(kBits));
  }
}

template <int kBits>
inline void unpack_bits(const Product& p, const char* tiles, int num_inputs, uint32_t* to) {
  if (is_by_fours(p)) unpack_fours<kBits>(tiles, num_inputs, to);
  else unpack<kBits>(tiles, num_inputs, int(p.weights.code_offset), to);
}

inline void unpack_codes(const Product& p, const char* tiles, int num_inputs, uint32_t* to) {
  if (p.weights.bits == 4) unpack_bits<4>(p, tiles, num_inputs, to);
  if (p.weights.bits == 5) unpack_bits<5>(p, tiles, num_inputs, to);
  if (p.weights.bits == 6) unpack_bits<6>(p, tiles, num_inputs, to);
  if (p.weights.bits == 8) unpack_bits<8>(p, tiles, num_inputs, to);
}

}  // namespace
