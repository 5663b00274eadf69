// Products by the dot products and the matrix instructions of Arm CPUs. Included by
// products_vectors.h.
//
// Integers: codes are signed bytes. Eight inputs of 16 outputs are eight vectors of weights. They meet
// one vector of two times eight bytes, by eight matrix instructions (I8MM), each with two outputs, or
// by sixteen dot products with four. The two are the digits of one row of 16-bit integers,
// 256 * high + low, or two rows of 8-bit ones. The sums are the same integers as those of pairs.
//
// Bfloat16: one row is multiplied by dot products of pairs (`BFloat16Words`), several by matrix
// instructions: two rows by two outputs and four inputs. Arm defines these as two dot products one
// after the other, with the same roundings, so both give the same bits.
#pragma once

namespace {

#if defined(OCTAVO_NEON_DOTPROD)

constexpr int kEight = 8;
constexpr int kEightVectors = kEight * kTileOutputs / 16;

// Writes codes of eight inputs of four outputs: the v-th quarter of eight vectors.
inline void store_eight(int8x16_t first_four, int8x16_t second_four, int v, int8_t* to) {
#if defined(OCTAVO_NEON_I8MM)
  const int32x4_t first = vreinterpretq_s32_s8(first_four);
  const int32x4_t second = vreinterpretq_s32_s8(second_four);
  vst1q_s8(to + 2 * v * 16, vreinterpretq_s8_s32(vzip1q_s32(first, second)));
  vst1q_s8(to + (2 * v + 1) * 16, vreinterpretq_s8_s32(vzip2q_s32(first, second)));
#else
  vst1q_s8(to + v * 16, first_four);
  vst1q_s8(to + (kVecs + v) * 16, second_four);
#endif
}

template <int kBits>
inline void unpack_eights(const char* tiles, int num_inputs, int code_offset, int8_t* to) {
  const int8x16_t offset = vdupq_n_s8(int8_t(code_offset));
  for (; num_inputs > 0; num_inputs -= kByteTileInputs, tiles += tile_bytes(kBits)) {
    for (int line = 0; line < tile_bytes(kBits); line += 64)
      __builtin_prefetch(tiles + kAheadBytes + line);
#pragma GCC unroll 8
    for (int four = 0; four < kByteTileInputs / 4; four += 2, to += kEightVectors * 16)
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) {
        const int first = four / kFoursAtOnce * kFoursAtOnce, i = four % kFoursAtOnce;
        const WordVec even = load_four<kBits>(tiles, first, i, v);
        const WordVec odd = load_four<kBits>(tiles, first, i + 1, v);
        store_eight(vsubq_s8(bit_cast<int8x16_t>(even), offset),
                    vsubq_s8(bit_cast<int8x16_t>(odd), offset), v, to);
      }
  }
}

// The sums of 16 outputs with the first and with the second eight bytes, in the order of the
// instructions.
struct EightSums {
  int32x4_t parts[kEightVectors];

  // Adds the products of one vector of weights.
  template <int kVector>
  inline __attribute__((always_inline)) void add(int8x16_t weights, int8x16_t bytes) {
#if defined(OCTAVO_NEON_I8MM)
    parts[kVector] = vmmlaq_s32(parts[kVector], bytes, weights);
#else
    constexpr int v = kVector % kVecs, four = kVector / kVecs;
    parts[v] = vdotq_laneq_s32(parts[v], weights, bytes, four);
    parts[kVecs + v] = vdotq_laneq_s32(parts[kVecs + v], weights, bytes, 2 + four);
#endif
  }

  // Those of the v-th four of outputs.
  IntVec first(int v) const {
#if defined(OCTAVO_NEON_I8MM)
    return bit_cast<IntVec>(vzip1q_s64(pairs(2 * v), pairs(2 * v + 1)));
#else
    return bit_cast<IntVec>(parts[v]);
#endif
  }
  IntVec second(int v) const {
#if defined(OCTAVO_NEON_I8MM)
    return bit_cast<IntVec>(vzip2q_s64(pairs(2 * v), pairs(2 * v + 1)));
#else
    return bit_cast<IntVec>(parts[kVecs + v]);
#endif
  }

 private:
  int64x2_t pairs(int i) const { return vreinterpretq_s64_s32(parts[i]); }
};

template <int kVector, int kCount>
inline __attribute__((always_inline)) void add_eight(const int8_t* weights,
                                                     const int8x16_t (&bytes)[kCount],
                                                     EightSums (&sums)[kCount]) {
  if constexpr (kVector < kEightVectors) {
    const int8x16_t w = vld1q_s8(weights + kVector * 16);
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) sums[i].template add<kVector>(w, bytes[i]);
    add_eight<kVector + 1, kCount>(weights, bytes, sums);
  }
}

inline void unpack_digits(const Product& p, const char* tiles, int num_inputs, uint32_t* to) {
  const int offset = int(p.weights.code_offset);
  int8_t* eights = (int8_t*)to;
  if (p.weights.bits == 4) unpack_eights<4>(tiles, num_inputs, offset, eights);
  if (p.weights.bits == 5) unpack_eights<5>(tiles, num_inputs, offset, eights);
  if (p.weights.bits == 6) unpack_eights<6>(tiles, num_inputs, offset, eights);
  if (p.weights.bits == 8) unpack_eights<8>(tiles, num_inputs, offset, eights);
}

// Rows of 16 bits one by one, and of 8 bits two by two: the row beyond an odd number is computed, and
// not read.
template <bool kIsByteRows>
struct Digits {
  // Two vectors of rows: with three compilers run out of registers.
  static constexpr int kRowsAtMost = kIsByteRows ? 4 : 2, kInputsToWord = kIsByteRows ? 4 : 2;

  // The bytes of the i-th vector of rows that `a` points to.
  static int8x16_t load_bytes(const uint32_t* a, int i) {
    if (!kIsByteRows) return vld1q_s8((const int8_t*)(a + i * kLineWords));
    const int8_t* first = (const int8_t*)(a + 2 * i * kLineWords);
    return vcombine_s8(vld1_s8(first), vld1_s8(first + kLineWords * 4));
  }

  static IntVec total_of(const EightSums* sums, int row, int v) {
    if (!kIsByteRows) return (sums[row].first(v) << 8) + sums[row].second(v);
    return row % 2 ? sums[row / 2].second(v) : sums[row / 2].first(v);
  }

  template <int kRows, int kGroups>
  static __attribute__((noinline)) void multiply(const Slice& c, int side, int row) {
    static_assert(kGroups == 1);
    constexpr int kCount = kIsByteRows ? (kRows + 1) / 2 : kRows;
    const Wholes wholes = wholes_of(c.p);
    const int64_t first_row = c.first_row + row;
    const int8_t* w = (const int8_t*)c.words[side];
    const int step_inputs = int(wholes.step_inputs);
    int64_t word = c.first_input / kInputsToWord, step = c.first_input / step_inputs;
    Factors<1> factors(c.p, c.output_groups + side, c.first_input);
    StoredSums stored = {c.sums + row * kSumsStride + side * kTileOutputs, c.first_input == 0};
    for (int at = 0; at < c.num_inputs; at += step_inputs, ++step) {
      EightSums sums[kCount] = {};
      // Line by line: a step is within one, or takes whole ones.
      const int64_t end = word + smaller(step_inputs, c.num_inputs - at) / kInputsToWord;
      const int together = smaller(int(end - word), kLineWords);
      for (; word < end; word += together) {
        const uint32_t* a = wholes.words + line_at<kWordRows>(first_row, word, wholes.num_words);
        for (int i = 0; i < together; i += kEight / kInputsToWord, w += kEightVectors * 16) {
          int8x16_t bytes[kCount];
#pragma GCC unroll 4
          for (int r = 0; r < kCount; ++r) bytes[r] = load_bytes(a + i, r);
          add_eight<0, kCount>(w, bytes, sums);
        }
      }
      Block<IntVec, kRows, 1> total;
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) total[r][0][v] = total_of(sums, r, v);
      const int64_t first = wholes.step_at(first_row, step, false);
      add_step<kIsByteRows, kRows, 1>(factors, wholes.scales + first, wholes.input_sums + first,
                                      total, stored);
      stored.is_first = false;
      factors.advance(step_inputs);
    }
  }
};

#endif

#if defined(OCTAVO_NEON_BF16)

constexpr bool kHasRowPairs = true;

// Two lines of pairs of inputs become fours of inputs, for two outputs in a vector.
inline void pair_up(const char* tiles, int num_inputs, uint32_t* to) {
  const uint32_t* from = (const uint32_t*)tiles;
  for (int i = 0; i < num_inputs; i += 4, from += 2 * kTileOutputs)
    for (int v = 0; v < kVecs; ++v, to += 2 * kWidth) {
      const uint32x4_t first = vld1q_u32(from + v * kWidth);
      const uint32x4_t second = vld1q_u32(from + kTileOutputs + v * kWidth);
      vst1q_u32(to, vzip1q_u32(first, second));
      vst1q_u32(to + kWidth, vzip2q_u32(first, second));
    }
}

// Products of bfloat16 rows, two by two. The row beyond an odd number is computed, and not read. A
// product of one row has its weights as they lie in memory.
struct RowPairs {
  static constexpr int kRowsAtMost = 4;
  // Two outputs of 16 in a vector.
  static constexpr int kVectors = kTileOutputs / 2;

  // Sums of two rows and four outputs as two vectors, each of two outputs; it is its own inverse.
  static void turn(Vec& first, Vec& second) {
    const float64x2_t low = bit_cast<float64x2_t>(first), high = bit_cast<float64x2_t>(second);
    first = bit_cast<Vec>(vzip1q_f64(low, high));
    second = bit_cast<Vec>(vzip2q_f64(low, high));
  }

  template <int kPairs>
  static void turn_all(Block<Vec, 2 * kPairs, 1>& sums) {
#pragma GCC unroll 2
    for (int r = 0; r < 2 * kPairs; r += 2)
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) turn(sums[r][0][v], sums[r + 1][0][v]);
  }

  template <int kRows, int kGroups>
  static __attribute__((noinline)) void multiply(const Slice& c, int side, int row) {
    static_assert(kGroups == 1);
    if constexpr (kRows == 1)
      if (c.p.num_rows == 1) return Floats<BFloat16Words>::multiply<1, 1>(c, side, row);
    constexpr int kPairs = (kRows + 1) / 2;
    const int64_t stride = c.p.panel_stride;
    const uint16_t* a =
        (const uint16_t*)c.p.panel + (c.first_row + row) * stride + c.first_input;
    const bfloat16_t* w = (const bfloat16_t*)c.words[side];
    float* to = c.sums + row * kSumsStride + side * kTileOutputs;
    Block<Vec, 2 * kPairs, 1> sums;
    load_sums<2 * kPairs, 1>(to, c.first_input, sums);
    turn_all<kPairs>(sums);
    for (int i = 0; i < c.num_inputs; i += 4, w += 4 * kTileOutputs) {
      bfloat16x8_t rows[kPairs];
#pragma GCC unroll 2
      for (int r = 0; r < kPairs; ++r)
        rows[r] = vreinterpretq_bf16_u16(vcombine_u16(vld1_u16(a + 2 * r * stride + i),
                                                      vld1_u16(a + (2 * r + 1) * stride + i)));
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        const bfloat16x8_t weights = vld1q_bf16(w + v * 8);
#pragma GCC unroll 2
        for (int r = 0; r < kPairs; ++r) {
          Vec& sum = sums[2 * r + v % 2][0][v / 2];
          sum = bit_cast<Vec>(vbfmmlaq_f32(bit_cast<float32x4_t>(sum), rows[r], weights));
        }
      }
    }
    turn_all<kPairs>(sums);
    store_sums<2 * kPairs, 1>(sums, to);
  }
};

#else

constexpr bool kHasRowPairs = false;

#endif

}  // namespace
