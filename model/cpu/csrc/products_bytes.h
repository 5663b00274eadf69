// Products of few rows by bytes, where there is an instruction for it: codes without a sign meet the
// high and the low bytes of the rows. Codes are not unpacked further than to bytes, and not stored.
// The sums of a group of inputs are the same integers as those of pairs of wholes.
#pragma once

namespace {

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)

inline IntVec dot_bytes(IntVec sum, WordVec codes, uint32_t x) {
#if defined(__AVX512VNNI__)
  return bit_cast<IntVec>(_mm512_dpbusd_epi32(bit_cast<__m512i>(sum), bit_cast<__m512i>(codes),
                                              _mm512_set1_epi32(int(x))));
#else
  return bit_cast<IntVec>(_mm256_dpbusd_avx_epi32(
      bit_cast<__m256i>(sum), bit_cast<__m256i>(codes), _mm256_set1_epi32(int(x))));
#endif
}

// kRows rows from `row` on and kGroups output groups, all inputs; adds to [kRows, kSumsStride].
template <int kBits, int kRows, int kGroups>
inline void multiply_bytes_of(const Product& p, const int64_t* output_groups, int row,
                              float* sums) {
  const Wholes wholes = wholes_of(p);
  const uint32_t* high_rows = wholes.high + row * wholes.digit_stride;
  const uint32_t* low_rows = wholes.low + row * wholes.digit_stride;
  const char* tiles[kGroups];
  for (int g = 0; g < kGroups; ++g) tiles[g] = tiles_of(p, output_groups[g]);
  // Codes of eight bits have a sign: 128 is added to each.
  const int offset = kBits == 8 ? 128 : int(p.weights.code_offset);
  const uint32_t flip = kBits == 8 ? 0x80808080u : 0;
  for (int64_t scale = 0; scale < wholes.num_scales; ++scale) {
    const int64_t begin = scale * p.weights.group_inputs, end = begin + p.weights.group_inputs;
    const int64_t last = (end < p.num_inputs ? end : p.num_inputs) / 4;
    IntVec high[kRows][kGroups][kVecs] = {}, low[kRows][kGroups][kVecs] = {};
    for (int64_t four = begin / 4; four < last; four += kFoursAtOnce) {
      const int64_t tile = four / kTileOutputs * tile_bytes(kBits);
      const int first = int(four % kTileOutputs);
#pragma GCC unroll 4
      for (int i = 0; i < kFoursAtOnce; ++i) {
        WordVec codes[kGroups][kVecs];
#pragma GCC unroll 4
        for (int g = 0; g < kGroups; ++g)
#pragma GCC unroll 4
          for (int v = 0; v < kVecs; ++v)
            codes[g][v] = load_four<kBits>(tiles[g] + tile, first, i, v) ^ flip;
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          const uint32_t x_high = high_rows[r * wholes.digit_stride + four + i];
          const uint32_t x_low = low_rows[r * wholes.digit_stride + four + i];
#pragma GCC unroll 4
          for (int g = 0; g < kGroups; ++g)
#pragma GCC unroll 4
            for (int v = 0; v < kVecs; ++v) {
              high[r][g][v] = dot_bytes(high[r][g][v], codes[g][v], x_high);
              low[r][g][v] = dot_bytes(low[r][g][v], codes[g][v], x_low);
            }
        }
      }
#pragma GCC unroll 4
      for (int g = 0; g < kGroups; ++g)
        for (int line = 0; line < kFoursAtOnce * kBits / 8; ++line)
          __builtin_prefetch(tiles[g] + tile + kAheadBytes + (first * kBits / 8 + line) * 64);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const int32_t inputs = offset * wholes.sums[(row + r) * wholes.num_scales + scale];
#pragma GCC unroll 4
      for (int g = 0; g < kGroups; ++g)
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v)
          high[r][g][v] = (high[r][g][v] << 8) + low[r][g][v] - inputs;
    }
    add_group<kRows, kGroups>(p, wholes, output_groups, scale, row, high, sums);
  }
}

// As many output groups at once as the registers have room for. Rows beyond the last are computed, and
// not read.
template <int kBits, int kRows, int kSide>
inline void multiply_rows_of_bytes(const Product& p, const int64_t* output_groups, float* sums) {
  constexpr int kGroups = smaller(kSide, larger(kWidth == 16 ? 8 / kRows : 2 / kRows, 1));
  for (int side = 0; side < kSide; side += kGroups)
    multiply_bytes_of<kBits, kRows, kGroups>(p, output_groups + side, 0,
                                             sums + side * kTileOutputs);
}

template <int kBits, int kSide>
inline void multiply_bits(const Product& p, const int64_t* output_groups, float* sums) {
  if (p.num_rows == 1) return multiply_rows_of_bytes<kBits, 1, kSide>(p, output_groups, sums);
  if (p.num_rows == 2) return multiply_rows_of_bytes<kBits, 2, kSide>(p, output_groups, sums);
  if constexpr (kDigitsRows > 2) {
    if (p.num_rows <= 4) return multiply_rows_of_bytes<kBits, 4, kSide>(p, output_groups, sums);
    multiply_rows_of_bytes<kBits, 8, kSide>(p, output_groups, sums);
  }
}

#endif

// Adds the scaled sums of up to kDigitsRows rows and kSide output groups to [rows, kSumsStride].
template <int kSide>
inline void multiply_by_bytes(const Product& p, const int64_t* output_groups, float* sums) {
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
  if (p.weights.bits == 4) multiply_bits<4, kSide>(p, output_groups, sums);
  if (p.weights.bits == 5) multiply_bits<5, kSide>(p, output_groups, sums);
  if (p.weights.bits == 6) multiply_bits<6, kSide>(p, output_groups, sums);
  if (p.weights.bits == 8) multiply_bits<8, kSide>(p, output_groups, sums);
#endif
}

}  // namespace
