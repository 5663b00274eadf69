// Products of few rows by bytes, where there is an instruction for it: codes without a sign meet the
// high and the low bytes of the rows. Codes are not unpacked further than to bytes, and not stored.
// The sums of a group of inputs are the same integers as those of pairs of wholes.
#pragma once

namespace {

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)

// kRows rows from `row` on and kGroups output groups, all inputs; writes to [kRows, kSumsStride].
template <bool kIsByteRows, int kBits, int kRows, int kGroups>
inline void multiply_bytes_of(const Product& p, const int64_t* output_groups, int row,
                              float* sums) {
  const Wholes wholes = wholes_of(p);
  const char* tiles[kGroups];
  for (int g = 0; g < kGroups; ++g) tiles[g] = tiles_of(p, output_groups[g]);
  Factors<kGroups> factors(p, output_groups, 0);
  KeptSums<kRows, kGroups> scaled = {};
  for (int64_t step = 0; step < wholes.num_steps; ++step) {
    const int64_t begin = step * wholes.step_inputs, end = begin + wholes.step_inputs;
    const int64_t last = (end < p.num_inputs ? end : p.num_inputs) / 4;
    const int64_t at = wholes.step_at(row, step, true);
    Block<IntVec, kRows, kGroups> high = {}, low = {};
    for (int64_t four = begin / 4; four < last; four += kFoursAtOnce) {
      const int64_t tile = four / kTileOutputs * tile_bytes(kBits);
      const int first = int(four % kTileOutputs);
      const int64_t digits = line_at<kDigitsRows>(row, four, wholes.num_fours);
#pragma GCC unroll 4
      for (int i = 0; i < kFoursAtOnce; ++i) {
        WordVec codes[kGroups][kVecs];
#pragma GCC unroll 4
        for (int g = 0; g < kGroups; ++g)
#pragma GCC unroll 4
          for (int v = 0; v < kVecs; ++v)
            codes[g][v] = load_four<kBits>(tiles[g] + tile, first, i, v) ^ sign_flip(kBits);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          const uint32_t x_high = wholes.high[digits + r * kLineWords + i];
          const uint32_t x_low = wholes.low[digits + r * kLineWords + i];
#pragma GCC unroll 4
          for (int g = 0; g < kGroups; ++g)
#pragma GCC unroll 4
            for (int v = 0; v < kVecs; ++v) {
              high[r][g][v] = ByteWords::add(high[r][g][v], codes[g][v], x_high);
              if (!kIsByteRows) low[r][g][v] = ByteWords::add(low[r][g][v], codes[g][v], x_low);
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
      const int32_t offset = wholes.offsets[at + r * kLineWords];
#pragma GCC unroll 4
      for (int g = 0; g < kGroups; ++g)
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v)
          high[r][g][v] =
              (kIsByteRows ? high[r][g][v] : (high[r][g][v] << 8) + low[r][g][v]) - offset;
    }
    add_step<kIsByteRows, kRows, kGroups>(factors, wholes.scales + at, wholes.input_sums + at,
                                          high, scaled);
    factors.advance(wholes.step_inputs);
  }
  store_sums<kRows, kGroups>(scaled.sums, sums);
}

// As many output groups at once as the registers have room for. Rows beyond the last are computed, and
// not read.
template <int kBits, int kRows, int kSide>
inline void multiply_rows_of_bytes(const Product& p, const int64_t* output_groups, float* sums) {
  constexpr int kGroups = smaller(kSide, larger(kWidth == 16 ? 8 / kRows : 2 / kRows, 1));
  for (int side = 0; side < kSide; side += kGroups) {
    const int64_t* groups = output_groups + side;
    float* to = sums + side * kTileOutputs;
    if (has_byte_rows(p)) multiply_bytes_of<true, kBits, kRows, kGroups>(p, groups, 0, to);
    else multiply_bytes_of<false, kBits, kRows, kGroups>(p, groups, 0, to);
  }
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

// Writes the scaled sums of up to kDigitsRows rows and kSide output groups to [rows, kSumsStride].
template <int kSide>
inline void multiply_by_bytes([[maybe_unused]] const Product& p,
                              [[maybe_unused]] const int64_t* output_groups,
                              [[maybe_unused]] float* sums) {
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
  if (p.weights.bits == 4) multiply_bits<4, kSide>(p, output_groups, sums);
  if (p.weights.bits == 5) multiply_bits<5, kSide>(p, output_groups, sums);
  if (p.weights.bits == 6) multiply_bits<6, kSide>(p, output_groups, sums);
  if (p.weights.bits == 8) multiply_bits<8, kSide>(p, output_groups, sums);
#endif
}

}  // namespace
