// Decode: one query token a row, split along its keys (flash-decoding: arXiv:2311.01282, section 2).
//
// It is bound by memory. So each key and value is read once for all query heads of its group, and a
// unit computes all its heads while its pages are in the nearest cache.
#pragma once

#include "simd.h"

namespace {

using octavo::Attention;
using octavo::Unit;
using octavo::kDecodeKeys;

// Keys whose values are summed before the next dimensions are; their lines stay in the L1 cache.
constexpr int kValueKeys = 32;
// Vectors of a head's dimensions held in registers: with four heads half of the register file.
constexpr int kValueVectors = kWidth == 16 ? 4 : 2;

// The largest score of no key: finite, so that the difference of two of them is not NaN.
constexpr float kNothingSeen = -1e30f;

// Prefetch distance in keys. The rows of one head are not adjacent, and the CPU's own prefetcher
// reaches two thirds of the bandwidth that this reaches.
constexpr int kKeysAhead = 16;

template <class T>
inline void prefetch(const T* from, int count) {
  for (int i = 0; i < count; i += 64 / int(sizeof(T))) __builtin_prefetch(from + i);
}

// Offsets of the keys [begin, end), in elements from the layer's first.
inline void locate_keys(const Attention& a, int row, int begin, int end, int64_t* offsets) {
  const int32_t* table = a.block_table + row * a.table_stride;
  const int64_t token_elements = int64_t(a.num_kv_heads) * a.head_dim;
  int page = begin / a.page_size, at = begin % a.page_size;
  for (int key = begin; key < end; ++key) {
    *offsets++ = (int64_t(table[page]) * a.page_size + at) * token_elements;
    if (++at == a.page_size) ++page, at = 0;
  }
}

// scores[g][key] = query g · key, for `Heads` queries `head_dim` apart.
template <class KV, int Heads>
inline void dot_keys(const KV* keys, const int64_t* offsets, int num_keys, const float* queries,
                     int head_dim, float* scores) {
  for (int key = 0; key < num_keys; key += 4) {
    const KV* rows[4];
    for (int i = 0; i < 4; ++i) rows[i] = keys + offsets[smaller(key + i, num_keys - 1)];
    for (int i = 0; i < 4; ++i)
      prefetch(keys + offsets[smaller(key + i + kKeysAhead, num_keys - 1)], head_dim);
    Vec dots[Heads][4] = {};
    for (int d = 0; d < head_dim; d += kWidth) {
      Vec k[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) k[i] = load(rows[i] + d);
#pragma GCC unroll 4
      for (int g = 0; g < Heads; ++g) {
        const Vec q = load(queries + g * head_dim + d);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) dots[g][i] += q * k[i];
      }
    }
#pragma GCC unroll 4
    for (int g = 0; g < Heads; ++g)
      sum4(dots[g][0], dots[g][1], dots[g][2], dots[g][3], scores + g * kDecodeKeys + key);
  }
}

// out[g][d] += weights[g][key] * value[key][d] for keys begin to end, `Vectors` vectors of dimensions.
template <class KV, int Heads, int Vectors>
inline void add_values(const KV* values, const int64_t* offsets, int begin, int end, int num_keys,
                       const float* weights, int head_dim, float* out) {
  Vec sums[Heads][Vectors];
#pragma GCC unroll 4
  for (int g = 0; g < Heads; ++g)
#pragma GCC unroll 4
    for (int i = 0; i < Vectors; ++i) sums[g][i] = load(out + g * head_dim + i * kWidth);
  for (int key = begin; key < end; ++key) {
    const KV* row = values + offsets[key];
    prefetch(values + offsets[smaller(key + kKeysAhead, num_keys - 1)], Vectors * kWidth);
    Vec v[Vectors];
#pragma GCC unroll 4
    for (int i = 0; i < Vectors; ++i) v[i] = load(row + i * kWidth);
#pragma GCC unroll 4
    for (int g = 0; g < Heads; ++g) {
      const Vec weight = broadcast(weights[g * kDecodeKeys + key]);
#pragma GCC unroll 4
      for (int i = 0; i < Vectors; ++i) sums[g][i] += weight * v[i];
    }
  }
#pragma GCC unroll 4
  for (int g = 0; g < Heads; ++g)
#pragma GCC unroll 4
    for (int i = 0; i < Vectors; ++i) store(out + g * head_dim + i * kWidth, sums[g][i]);
}

// Replaces scores by weights 2^(score - largest); returns their sum.
inline float softmax(float* scores, int num_keys, float* largest) {
  const int padded = (num_keys + kWidth - 1) / kWidth * kWidth;
  for (int key = num_keys; key < padded; ++key) scores[key] = -__builtin_inff();
  Vec top = load(scores);
  for (int key = kWidth; key < padded; key += kWidth) top = max(top, load(scores + key));
  *largest = top[0];
  for (int i = 1; i < kWidth; ++i) *largest = top[i] > *largest ? top[i] : *largest;
  Vec total = {};
  for (int key = 0; key < padded; key += kWidth) {
    const Vec weight = exp2(load(scores + key) - *largest);
    store(scores + key, weight);
    total += weight;
  }
  return sum(total);
}

// `Heads` query heads of one KV head: sums[g][d] and, in stats[g], largest score and sum of weights.
template <class KV, int Heads>
void decode_heads(const KV* keys, const KV* values, const int64_t* offsets, int num_keys,
                  const float* queries, int head_dim, float* scores, float* sums, float* stats) {
  dot_keys<KV, Heads>(keys, offsets, num_keys, queries, head_dim, scores);
  for (int g = 0; g < Heads; ++g)
    stats[2 * g + 1] = softmax(scores + g * kDecodeKeys, num_keys, stats + 2 * g);
  for (int i = 0; i < Heads * head_dim; ++i) sums[i] = 0.0f;
  for (int key = 0; key < num_keys; key += kValueKeys) {
    const int end = smaller(key + kValueKeys, num_keys);
    int d = 0;
    for (; d + kValueVectors * kWidth <= head_dim; d += kValueVectors * kWidth)
      add_values<KV, Heads, kValueVectors>(values + d, offsets, key, end, num_keys, scores, head_dim,
                                           sums + d);
    for (; d < head_dim; d += kWidth)
      add_values<KV, Heads, 1>(values + d, offsets, key, end, num_keys, scores, head_dim, sums + d);
  }
}

inline void store_head(const Attention& a, int token, int head, const float* sums, float total) {
  const int64_t to = token * a.out.token_stride + head * a.out.head_stride;
  for (int d = 0; d < a.head_dim; d += kWidth)
    store_some(a.out.data, a.out.dtype, to + d, load(sums + d) / total, kWidth);
}

inline void store_partial(const Attention& a, const Unit& unit, int head, const float* sums,
                          const float* stats) {
  const int64_t heads = int64_t(a.num_kv_heads) * a.group;
  float* to = a.partials + (unit.partial * heads + head) * (a.head_dim + 2);
  for (int d = 0; d < a.head_dim; d += kWidth) store(to + d, load(sums + d));
  to[a.head_dim] = stats[0];
  to[a.head_dim + 1] = stats[1];
}

template <class KV>
void decode_unit(const Attention& a, const Unit& unit, float* scratch) {
  int64_t offsets[kDecodeKeys];
  alignas(64) float scores[4 * kDecodeKeys];
  float stats[8];
  const int num_keys = unit.key_end - unit.key_begin;
  locate_keys(a, unit.row, unit.key_begin, unit.key_end, offsets);
  float* queries = scratch;
  float* sums = scratch + 4 * a.head_dim;
  const int token = a.query_starts[unit.row];
  for (int kv_head = unit.head_begin; kv_head < unit.head_end; ++kv_head) {
    const KV* keys = (const KV*)a.keys + int64_t(kv_head) * a.head_dim;
    const KV* values = (const KV*)a.values + int64_t(kv_head) * a.head_dim;
    for (int first = 0; first < a.group; first += 4) {
      const int count = smaller(4, a.group - first), head = kv_head * a.group + first;
      for (int g = 0; g < count; ++g)
        for (int d = 0; d < a.head_dim; d += kWidth) {
          const int64_t at = token * a.q.token_stride + (head + g) * a.q.head_stride + d;
          const Vec q = load_some(a.q.data, a.q.dtype, at, kWidth);
          store(queries + g * a.head_dim + d, q * a.scale_log2e);
        }
      const auto run = count == 4   ? decode_heads<KV, 4>
                       : count == 3 ? decode_heads<KV, 3>
                       : count == 2 ? decode_heads<KV, 2>
                                    : decode_heads<KV, 1>;
      run(keys, values, offsets, num_keys, queries, a.head_dim, scores, sums, stats);
      for (int g = 0; g < count; ++g) {
        const float* head_sums = sums + g * a.head_dim;
        if (unit.partial < 0)
          store_head(a, token, head + g, head_sums, stats[2 * g + 1]);
        else
          store_partial(a, unit, head + g, head_sums, stats + 2 * g);
      }
    }
  }
}

void decode_by_vectors(const Attention& a, const Unit& unit, float* scratch) {
  switch (a.kv_dtype) {
    case kFloat16: return decode_unit<Float16>(a, unit, scratch);
    case kBFloat16: return decode_unit<BFloat16>(a, unit, scratch);
    default: return decode_unit<float>(a, unit, scratch);
  }
}

// Two parts of a softmax, joined: the factor of each, and the largest score of both.
struct Joint {
  Vec first;
  Vec second;
  Vec largest;
};

inline Joint join(Vec first, Vec second) {
  const Vec largest = max(first, second);
  return {exp2(first - largest), exp2(second - largest), largest};
}

// Joins the partial softmaxes of one row, in their order.
void merge(const Attention& a, const octavo::Merge& m) {
  const int heads = a.num_kv_heads * a.group, dim = a.head_dim;
  const int64_t stride = int64_t(heads) * (dim + 2);
  alignas(64) float sums[octavo::kMaxHeadDim];
  for (int head = 0; head < heads; ++head) {
    const float* part = a.partials + m.first_partial * stride + head * (dim + 2);
    Vec largest = broadcast(kNothingSeen), total = {};
    for (int d = 0; d < dim; ++d) sums[d] = 0.0f;
    for (int i = 0; i < m.num_partials; ++i, part += stride) {
      const Joint joint = join(largest, broadcast(part[dim]));
      largest = joint.largest;
      total = multiply_add(total, joint.first, broadcast(part[dim + 1]) * joint.second);
      for (int d = 0; d < dim; d += kWidth)
        store(sums + d, multiply_add(load(sums + d), joint.first, load(part + d) * joint.second));
    }
    store_head(a, a.query_starts[m.row], head, sums, total[0]);
  }
}

}  // namespace
