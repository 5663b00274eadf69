// Attention by vectors, for any instruction set and pages of any dtype.
//
// A score is summed along the dimensions: a vector of partial sums, then their sum. Weighted values
// are summed in the order of keys. Both need nothing transposed, for one lane as for many: keys and
// values are read as they lie in their pages, and up to four lanes share what is loaded.
// attention_vector_lanes.h has the softmax over chunks.
#pragma once

#include "attention_codes.h"

namespace {

// Lanes that share a load: as many as there are registers for their sums.
constexpr int kLaneGroup = kHasManyRegisters ? 4 : 3;
// Vectors of a value's dimensions whose sums are held in registers.
constexpr int kValueVectors = 4;
// Keys whose scores are summed side by side.
constexpr int kScoreKeys = 4;

// ---- operands ----------------------------------------------------------------------------------

// The operands of both products as floats.
template <class KV>
struct Operands {
  // Of queries and weights.
  typedef float Element;
  typedef Vec Operand;
  typedef Vec Sum;
  static constexpr bool kIsRounded = false;
  // Whether many lanes have keys and values widened to elements first.
  static constexpr bool kIsWidened = sizeof(KV) < sizeof(Element);
  static void widen(const KV* from, Element* to) { store(to, load(from)); }
  // Dimensions of an operand of a query and a key; keys of an operand of values.
  static constexpr int kDims = kWidth;
  static constexpr int kKeys = 1;

  static Operand query(const Element* at) { return load(at); }
  static Operand key(const KV* row) { return load(row); }
  static Operand half_key(const KV* row) { return key(row); }
  static Operand weight(const Element* at) { return broadcast(*at); }
  // The i-th of `kVectors` vectors of values.
  template <int kVectors>
  static Operand value(const KV* const* rows, int i) {
    return load(rows[0] + i * kWidth);
  }
  static Vec add(Vec sum, Operand x, Operand y) { return multiply_add(x, y, sum); }
  static void restore_order(float*, int) {}

  // Of codes: writes a query, and returns what its products must be multiplied by.
  static float store_query(const float* from, int depth, Element* to) {
    __builtin_memcpy(to, from, depth * sizeof(float));
    return 1.0f;
  }
  // Of codes: writes weights to their own place, with their largest, and returns the same.
  static float store_weights(float*, int, int, IntVec) { return 1.0f; }
};

#if defined(__AVX512F__)
// Restores the order of the sums of 32 dimensions whose operands were interleaved from two rows.
inline void restore_order_of_pairs(float* sums, int head_dim) {
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  for (int d = 0; d + 2 * kWidth <= head_dim; d += 2 * kWidth) {
    const __m512 low = _mm512_loadu_ps(sums + d), high = _mm512_loadu_ps(sums + d + kWidth);
    _mm512_storeu_ps(sums + d, _mm512_permutex2var_ps(low, first, high));
    _mm512_storeu_ps(sums + d + kWidth, _mm512_permutex2var_ps(low, second, high));
  }
}
#endif

#if defined(OCTAVO_BF16_PAIRS)
// Queries and weights that enter products as bfloat16.
struct BFloat16Elements {
  typedef BFloat16 Element;
  typedef Vec Sum;
  static constexpr bool kIsRounded = true;
  static constexpr bool kIsWidened = false;

  static float store_query(const float* from, int depth, Element* to) {
    for (int d = 0; d < depth; d += kWidth) store(to + d, load(from + d));
    return 1.0f;
  }
  static float store_weights(float* weights, int from, int to, IntVec) {
    for (int key = from; key < to; key += kWidth)
      store((Element*)weights + key, load(weights + key));
    return 1.0f;
  }
};
#endif

#if defined(__AVX512BF16__)
// Pairs of bfloat16: two dimensions of a key, or one dimension of two keys' values.
template <>
struct Operands<BFloat16> : BFloat16Elements {
  typedef __m512i Operand;
  static constexpr int kDims = 2 * kWidth;
  static constexpr int kKeys = 2;

  static Operand query(const Element* at) { return _mm512_loadu_si512(at); }
  static Operand key(const BFloat16* row) { return _mm512_loadu_si512(row); }
  static Operand half_key(const BFloat16* row) { return _mm512_zextsi256_si512(half(row)); }
  static Operand weight(const Element* at) {
    int32_t pair;
    __builtin_memcpy(&pair, at, sizeof(pair));
    return _mm512_set1_epi32(pair);
  }
  // Two rows interleave within the quarters of a vector, which is one instruction and leaves 32
  // dimensions in an order of their own: `restore_order` undoes it in the sums.
  template <int kVectors>
  static Operand value(const BFloat16* const* rows, int i) {
    if constexpr (kVectors == 1) {
      const __m512i even = _mm512_cvtepu16_epi32(half(rows[0]));
      const __m512i odd = _mm512_cvtepu16_epi32(half(rows[1]));
      return _mm512_or_si512(even, _mm512_slli_epi32(odd, 16));
    }
    const int at = i / 2 * kDims;
    const __m512i even = _mm512_loadu_si512(rows[0] + at), odd = _mm512_loadu_si512(rows[1] + at);
    return i % 2 ? _mm512_unpackhi_epi16(even, odd) : _mm512_unpacklo_epi16(even, odd);
  }
  static Vec add(Vec sum, Operand x, Operand y) {
    return bit_cast<Vec>(_mm512_dpbf16_ps(bit_cast<__m512>(sum), (__m512bh)x, (__m512bh)y));
  }
  static void restore_order(float* sums, int head_dim) { restore_order_of_pairs(sums, head_dim); }

 private:
  static __m256i half(const BFloat16* at) { return _mm256_loadu_si256((const __m256i*)at); }
};

// 8-bit floats are bfloat16 without rounding.
template <>
struct Operands<Float8> : Operands<BFloat16> {
  static constexpr bool kIsWidened = true;
  static void widen(const Float8* from, BFloat16* to) { store(to, load(from)); }

  static Operand key(const Float8* row) {
    const __m512 low = bit_cast<__m512>(load(row)), high = bit_cast<__m512>(load(row + kWidth));
    return (__m512i)_mm512_cvtne2ps_pbh(high, low);
  }
  static Operand half_key(const Float8* row) { return _mm512_zextsi256_si512(half(row)); }
  template <int kVectors>
  static Operand value(const Float8* const* rows, int i) {
    if constexpr (kVectors == 1) {
      const __m512i even = _mm512_cvtepu16_epi32(half(rows[0]));
      const __m512i odd = _mm512_cvtepu16_epi32(half(rows[1]));
      return _mm512_or_si512(even, _mm512_slli_epi32(odd, 16));
    }
    const int at = i / 2 * kDims;
    const __m512i even = key(rows[0] + at), odd = key(rows[1] + at);
    return i % 2 ? _mm512_unpackhi_epi16(even, odd) : _mm512_unpacklo_epi16(even, odd);
  }

 private:
  static __m256i half(const Float8* at) {
    return (__m256i)_mm512_cvtneps_pbh(bit_cast<__m512>(load(at)));
  }
};
#elif defined(OCTAVO_NEON_BF16)
// The same by 128 bits.
template <>
struct Operands<BFloat16> : BFloat16Elements {
  typedef bfloat16x8_t Operand;
  static constexpr int kDims = 2 * kWidth;
  static constexpr int kKeys = 2;

  static Operand query(const Element* at) { return vld1q_bf16((const bfloat16_t*)at); }
  static Operand key(const BFloat16* row) { return query(row); }
  static Operand half_key(const BFloat16* row) {
    return vreinterpretq_bf16_u16(vcombine_u16(vld1_u16((const uint16_t*)row), vcreate_u16(0)));
  }
  static Operand weight(const Element* at) {
    uint32_t pair;
    __builtin_memcpy(&pair, at, sizeof(pair));
    return vreinterpretq_bf16_u32(vdupq_n_u32(pair));
  }
  template <int kVectors>
  static Operand value(const BFloat16* const* rows, int i) {
    const uint16x4_t even = vld1_u16((const uint16_t*)rows[0] + i * kWidth);
    const uint16x4_t odd = vld1_u16((const uint16_t*)rows[1] + i * kWidth);
    return vreinterpretq_bf16_u16(vcombine_u16(vzip1_u16(even, odd), vzip2_u16(even, odd)));
  }
  static Vec add(Vec sum, Operand x, Operand y) {
    return bit_cast<Vec>(vbfdotq_f32(bit_cast<float32x4_t>(sum), x, y));
  }
  static void restore_order(float*, int) {}
};
#endif

// ---- products ----------------------------------------------------------------------------------

// One KV head of a chunk. Offsets are of all keys of the score's and the values' steps: those that
// no lane sees are another key's.
template <class KV>
struct HeadRows {
  const KV* keys;
  const KV* values;
  // The rows that are read after the values, or null.
  const KV* next;
  const int64_t* offsets;
  // The keys that some lane sees.
  int begin;
  int end;
  // Whether they are still in a far cache or in memory.
  bool is_far;

  // Called before a tile of keys (or values) is read: see TiledRows.
  void bring_keys(int, int) const {}
  void bring_values(int, int) const {}

  // Prefetches the row some keys ahead; past the end, of the rows read `after`.
  __attribute__((always_inline)) void prefetch_ahead(const KV* pages, const KV* after, int key,
                                                     int count) const {
    int ahead = key + kKeysAhead;
    if (ahead >= end) ahead += begin - end, pages = after;
    if (pages && ahead < end) prefetch(pages + offsets[ahead], count);
  }
};

template <int kLanes>
struct Group {
  static constexpr int lanes = kLanes;
};

// Runs function(first lane, Group) for groups of lanes.
template <class Function>
inline void in_groups(int count, const Function& function) {
  int lane = 0;
  for (; lane + kLaneGroup <= count; lane += kLaneGroup) function(lane, Group<kLaneGroup>());
  switch (count - lane) {
    case 3: return function(lane, Group<3>());
    case 2: return function(lane, Group<2>());
    case 1: return function(lane, Group<1>());
  }
}

// Sums of integers stand in the place of floats until they are complete.
template <class Sum>
inline Sum load_total(const float* from) {
  Sum sums;
  __builtin_memcpy(&sums, from, sizeof(sums));
  return sums;
}

template <class Sum>
inline void store_total(float* to, Sum sums) {
  __builtin_memcpy(to, &sums, sizeof(sums));
}

// The products are not inlined, so that each has the registers to itself.

// scores[lane][key] = query · key, for keys begin to end. `queries` are `depth` apart.
// `kHeadDim` is a head_dim that is known to the compiler, or 0.
template <class O, int kLanes, int kHeadDim, class KV>
__attribute__((noinline)) void score_keys(const HeadRows<KV>& rows, int begin, int end,
                                          const typename O::Element* queries, int any_head_dim,
                                          float* scores, bool is_far) {
  const int head_dim = kHeadDim ? kHeadDim : any_head_dim;
  const int depth = round_up(head_dim, O::kDims);
  for (int key = begin; key < end; key += kScoreKeys) {
    const KV* row[kScoreKeys];
#pragma GCC unroll 4
    for (int i = 0; i < kScoreKeys; ++i) row[i] = rows.keys + rows.offsets[key + i];
    if (is_far)
      for (int i = 0; i < kScoreKeys; ++i)
        rows.prefetch_ahead(rows.keys, rows.values, key + i, head_dim);
    typename O::Sum dots[kLanes][kScoreKeys] = {};
    const auto add_dims = [&](int d, auto load_key) __attribute__((always_inline)) {
      typename O::Operand q[kLanes];
#pragma GCC unroll 4
      for (int lane = 0; lane < kLanes; ++lane) q[lane] = O::query(queries + lane * depth + d);
#pragma GCC unroll 4
      for (int i = 0; i < kScoreKeys; ++i) {
        const auto k = load_key(row[i] + d);
#pragma GCC unroll 4
        for (int lane = 0; lane < kLanes; ++lane)
          dots[lane][i] = O::add(dots[lane][i], q[lane], k);
      }
    };
    int d = 0;
#pragma GCC unroll 8
    for (; d + O::kDims <= head_dim; d += O::kDims) add_dims(d, [](auto* at) { return O::key(at); });
    if (d < head_dim) add_dims(d, [](auto* at) { return O::half_key(at); });
#pragma GCC unroll 4
    for (int lane = 0; lane < kLanes; ++lane)
      sum4(dots[lane][0], dots[lane][1], dots[lane][2], dots[lane][3],
           scores + lane * kScoresStride + key);
  }
}

// sums[lane][d] += weights[lane][key] * values[key][d], for keys begin to end and `kVectors` vectors
// of dimensions from `d` on.
template <class O, int kLanes, int kVectors, class KV>
__attribute__((noinline)) void add_values(const HeadRows<KV>& rows, int begin, int end,
                                          const typename O::Element* weights, int d, int head_dim,
                                          float* sums, bool is_far) {
  const KV* next = rows.next ? rows.next + d : nullptr;
  constexpr int kStride = kScoresStride * int(sizeof(float) / sizeof(typename O::Element));
  typename O::Sum totals[kLanes][kVectors];
#pragma GCC unroll 4
  for (int lane = 0; lane < kLanes; ++lane)
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i)
      totals[lane][i] = load_total<typename O::Sum>(sums + lane * head_dim + d + i * kWidth);
  for (int key = begin; key < end; key += O::kKeys) {
    const KV* row[O::kKeys];
#pragma GCC unroll 2
    for (int i = 0; i < O::kKeys; ++i) row[i] = rows.values + rows.offsets[key + i] + d;
    if (is_far)
      for (int i = 0; i < O::kKeys; ++i)
        rows.prefetch_ahead(rows.values + d, next, key + i, kVectors * kWidth);
    typename O::Operand weight[kLanes];
#pragma GCC unroll 4
    for (int lane = 0; lane < kLanes; ++lane)
      weight[lane] = O::weight(weights + lane * kStride + key);
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) {
      const auto value = O::template value<kVectors>(row, i);
#pragma GCC unroll 4
      for (int lane = 0; lane < kLanes; ++lane)
        totals[lane][i] = O::add(totals[lane][i], weight[lane], value);
    }
  }
#pragma GCC unroll 4
  for (int lane = 0; lane < kLanes; ++lane)
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i)
      store_total(sums + lane * head_dim + d + i * kWidth, totals[lane][i]);
}

// ---- softmax -----------------------------------------------------------------------------------

// Returns the largest score that a lane sees, and hides the others from `from` to `to`.
inline float largest_score(float* scores, int from, int to, Seen seen) {
  Vec top = broadcast(kNothingSeen);
  for (int key = from; key < to; key += kWidth) {
    if (key < seen.begin || key + kWidth > seen.end) hide(scores, key, seen);
    top = max(load(scores + key), top);
  }
  return largest_of(top);
}

// Replaces scores by weights, and returns their sum.
template <class O>
inline float weigh(float* scores, int from, int to, float largest) {
  typename O::Element* weights = (typename O::Element*)scores;
  Vec total = {};
  for (int key = from; key < to; key += kWidth) {
    const Vec x = load(scores + key) - largest;
    const Vec weight = O::kIsRounded ? exp2_coarse(x) : exp2_fine(x);
    store(weights + key, weight);
    total += weight;
  }
  float sums[4];
  sum4(total, total, total, total, sums);
  return sums[0];
}

}  // namespace
