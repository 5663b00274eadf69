// What reading pages of codes takes beside reading floats: scales, rotated queries, unpacked rows.
//
// Scales never enter an inner product. A key's scale multiplies its score, a value's its weight, so
// codes are operands as they lie. int4 has a minimum too: q · (scale * code + minimum) needs the sum
// of q once, and the weighted minimums of values are one number for all dimensions.
#pragma once

#include "attention_parts.h"

namespace {

// Subtracted from codes of four bits: sums of codes around zero cancel less of the minimum.
constexpr int kMiddleCode = 8;

// Whether codes are steps from a minimum on, which products meet by the sum of their other operand.
inline bool has_minimums(DType kv_dtype) { return kv_dtype == kInt4; }

// A bfloat16 number.
inline float wide(uint16_t bits) { return bit_cast<float>(uint32_t(bits) << 16); }

// Of the keys of a chunk and one KV head. Those that no lane sees have zeros.
struct HeadScales {
  bool have_minimums;
  // Whether the scale of a value is NaN: queries before it must not meet it.
  bool has_lost_values;
  alignas(64) float keys[kChunkKeys];
  alignas(64) float values[kChunkKeys];
  alignas(64) float key_minimums[kChunkKeys];
  alignas(64) float value_minimums[kChunkKeys];

  void load(const Attention& a, const Chunk& chunk, int head) {
    have_minimums = has_minimums(a.kv_dtype);
    load_side(a, chunk, head, (const uint16_t*)a.key_scales, keys, key_minimums);
    load_side(a, chunk, head, (const uint16_t*)a.value_scales, values, value_minimums);
    IntVec lost = {};
    for (int key = round_down(chunk.begin, kWidth); key < chunk.end; key += kWidth)
      lost |= ::load(values + key) != ::load(values + key);
    has_lost_values = false;
    for (int i = 0; i < kWidth; ++i) has_lost_values |= lost[i] != 0;
  }

 private:
  static void load_side(const Attention& a, const Chunk& chunk, int head, const uint16_t* plane,
                        float* scales, float* minimums) {
    // Softmaxes reach beyond the keys that are seen, to whole tiles at most.
    const int from = round_down(chunk.begin, kTileKeys), to = round_up(chunk.end, kTileKeys);
    for (int key = from; key < to; key += kWidth)
      store(scales + key, Vec{}), store(minimums + key, Vec{});
    if (has_minimums(a.kv_dtype)) {
      for (int key = chunk.begin; key < chunk.end; ++key) {
        const uint16_t* at = plane + 2 * (chunk.vectors[key] + head);
        scales[key] = wide(at[0]);
        minimums[key] = wide(at[1]) + kMiddleCode * scales[key];
      }
      return;
    }
    // 8-bit floats are loaded as 2^-8 of their values.
    const float factor = a.kv_dtype == kFloat8 ? 256.0f : 1.0f;
    for (int key = chunk.begin; key < chunk.end; ++key)
      scales[key] = wide(plane[chunk.vectors[key] + head]) * factor;
  }
};

// ---- operands ----------------------------------------------------------------------------------

// Writes a query that meets codes to `depth` floats: see `query_part`. It is rotated as the keys are.
inline void read_query(const Attention& a, const octavo::Rows& rows, int64_t from, int depth,
                       float* to) {
  for (int d = 0; d < depth; d += kWidth) store(to + d, query_part(a, rows, from, d));
  if (is_rotated(a.kv_dtype)) hadamard(to, a.head_dim);
}

// The sum of a query as it enters the products.
template <class Element>
inline float sum_of(const Element* query, int depth) {
  Vec total = {};
  for (int d = 0; d < depth; d += kWidth) total += load(query + d);
  float sums[4];
  sum4(total, total, total, total, sums);
  return sums[0];
}

// Codes of four bits, two a byte, as bytes around zero.
inline void unpack_row(const uint8_t* from, int head_dim, int8_t* to) {
  int d = 0;
#if defined(__AVX512F__)
  const __m512i mask = _mm512_set1_epi8(15), middle = _mm512_set1_epi8(kMiddleCode);
  for (; d + 64 <= head_dim; d += 64) {
    const __m512i pairs = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)(from + d / 2)));
    // (pairs | pairs << 4) & mask
    const __m512i codes =
        _mm512_ternarylogic_epi32(pairs, _mm512_slli_epi16(pairs, 4), mask, 0xa8);
    _mm512_storeu_si512(to + d, _mm512_sub_epi8(codes, middle));
  }
#elif defined(__AVX2__)
  const __m256i mask = _mm256_set1_epi8(15), middle = _mm256_set1_epi8(kMiddleCode);
  for (; d + 32 <= head_dim; d += 32) {
    const __m256i pairs = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)(from + d / 2)));
    const __m256i codes =
        _mm256_and_si256(_mm256_or_si256(pairs, _mm256_slli_epi16(pairs, 4)), mask);
    _mm256_storeu_si256((__m256i*)(to + d), _mm256_sub_epi8(codes, middle));
  }
#endif
  for (; d < head_dim; d += 2) {
    to[d] = int8_t((from[d / 2] & 15) - kMiddleCode);
    to[d + 1] = int8_t((from[d / 2] >> 4) - kMiddleCode);
  }
}

// Unpacks the rows of one head: `offsets` are bytes from `pages`, `to` is [keys, head_dim].
inline void unpack_rows(const uint8_t* pages, const int64_t* offsets, int begin, int end,
                        int head_dim, int8_t* to) {
  for (int key = begin; key < end; ++key) {
    prefetch(pages + offsets[smaller(key + kKeysAhead, end - 1)], head_dim / 2);
    unpack_row(pages + offsets[key], head_dim, to + key * head_dim);
  }
}

// ---- softmax -----------------------------------------------------------------------------------

// Replaces products of a query with codes by scores, hides those that the lane does not see, and
// returns the largest of the others. `factor` is the query's own.
inline float scale_scores(float* scores, int from, int to, Seen seen, const HeadScales& scales,
                          float factor, float query_sum) {
  Vec top = broadcast(kNothingSeen);
  for (int key = from; key < to; key += kWidth) {
    Vec score = load(scores + key) * (load(scales.keys + key) * factor);
    if (scales.have_minimums)
      score = multiply_add(load(scales.key_minimums + key), broadcast(query_sum), score);
    store(scores + key, score);
    if (key < seen.begin || key + kWidth > seen.end) {
      hide(scores, key, seen);
      score = load(scores + key);
    }
    top = max(score, top);
  }
  return largest_of(top);
}

// Returns scales, and zero where the weight is zero: a key out of view may have a scale of NaN.
inline Vec where_seen(Vec weight, Vec scale) {
  return bit_cast<Vec>(bit_cast<IntVec>(scale) & (weight != 0.0f));
}

// Weights of one lane's values: their sum, what the sum of products is multiplied by, and the
// weighted sum of minimums.
struct Weighed {
  float total;
  float factor;
  float minimum;
};

template <class O, bool kHasLostValues>
inline Weighed weigh_by_scales(float* scores, int from, int to, float largest,
                               const HeadScales& scales) {
  Vec total = {}, minimum = {};
  IntVec top = {};
  for (int key = from; key < to; key += kWidth) {
    const Vec x = load(scores + key) - largest;
    const Vec weight = O::kIsRounded ? exp2_coarse(x) : exp2_fine(x);
    const auto factor = [&](const float* at) {
      return kHasLostValues ? where_seen(weight, load(at + key)) : load(at + key);
    };
    const Vec scaled = weight * factor(scales.values);
    total += weight;
    if (scales.have_minimums)
      minimum = multiply_add(weight, factor(scales.value_minimums), minimum);
    // As integers: NaN is the largest.
    const IntVec bits = bit_cast<IntVec>(scaled);
    top = bits > top ? bits : top;
    store(scores + key, scaled);
  }
  float sums[4];
  sum4(total, minimum, total, minimum, sums);
  return {sums[0], O::store_weights(scores, from, to, top), sums[1]};
}

// Replaces scores by weights times the scales of values.
template <class O>
inline Weighed weigh_scaled(float* scores, int from, int to, float largest,
                            const HeadScales& scales) {
  return (scales.has_lost_values ? weigh_by_scales<O, true> : weigh_by_scales<O, false>)(
      scores, from, to, largest, scales);
}

// Makes a lane's sums of weights times codes those of weights times values.
inline void complete_sums(float* sums, int head_dim, const Weighed& weighed) {
  const Vec factor = broadcast(weighed.factor), minimum = broadcast(weighed.minimum);
  for (int d = 0; d < head_dim; d += kWidth)
    store(sums + d, multiply_add(load(sums + d), factor, minimum));
}

}  // namespace
