// Attention by vectors, for any instruction set and pages of any dtype.
//
// A score is summed along the dimensions: a vector of partial sums, then their sum. Weighted values
// are summed in the order of keys. Both need nothing transposed, for one lane as for many: keys and
// values are read as they lie in their pages, and up to four lanes share what is loaded.
#pragma once

#include "attention_parts.h"

namespace {

using octavo::kVectorLanes;

// Lanes that share a load: as many as there are registers for their sums.
constexpr int kLaneGroup = kWidth == 16 ? 4 : 3;
// Lanes whose softmax is computed while a chunk's keys and values are in a near cache.
constexpr int kLanesAtOnce = 4 * kLaneGroup;
// Vectors of a value's dimensions whose sums are held in registers.
constexpr int kValueVectors = 4;
// Keys whose scores are summed side by side.
constexpr int kScoreKeys = 4;
// Keys that all lanes of a block meet while they are in the nearest cache.
constexpr int kTileKeys = 32;
// Prefetch distance in keys. The rows of one head are not adjacent, and the CPU's own prefetcher
// reaches two thirds of the bandwidth that this reaches.
constexpr int kKeysAhead = 16;
// From so many lanes on it pays to widen keys and values once for all of them.
constexpr int kManyLanes = 2 * kLaneGroup;

// ---- operands ----------------------------------------------------------------------------------

// The operands of both products as floats.
template <class KV>
struct Operands {
  // Of queries and weights.
  typedef float Element;
  typedef Vec Operand;
  static constexpr bool kIsRounded = false;
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
};

#if defined(__AVX512BF16__)
// Pairs of bfloat16: two dimensions of a key, or one dimension of two keys' values.
template <>
struct Operands<BFloat16> {
  typedef BFloat16 Element;
  typedef __m512i Operand;
  static constexpr bool kIsRounded = true;
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
  static void restore_order(float* sums, int head_dim) {
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    for (int d = 0; d + kDims <= head_dim; d += kDims) {
      const __m512 low = _mm512_loadu_ps(sums + d), high = _mm512_loadu_ps(sums + d + kWidth);
      _mm512_storeu_ps(sums + d, _mm512_permutex2var_ps(low, first, high));
      _mm512_storeu_ps(sums + d + kWidth, _mm512_permutex2var_ps(low, second, high));
    }
  }

 private:
  static __m256i half(const BFloat16* at) { return _mm256_loadu_si256((const __m256i*)at); }
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
    Vec dots[kLanes][kScoreKeys] = {};
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
  Vec totals[kLanes][kVectors];
#pragma GCC unroll 4
  for (int lane = 0; lane < kLanes; ++lane)
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i)
      totals[lane][i] = load(sums + lane * head_dim + d + i * kWidth);
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
      store(sums + lane * head_dim + d + i * kWidth, totals[lane][i]);
}

// ---- softmax -----------------------------------------------------------------------------------

inline float largest_of(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(bit_cast<__m512>(v));
#else
  float top = v[0];
  for (int i = 1; i < kWidth; ++i) top = v[i] > top ? v[i] : top;
  return top;
#endif
}

// Sets the scores of keys outside the view to minus infinity.
inline void hide(float* scores, int key, Seen seen) {
  for (int at = key; at < key + kWidth; ++at)
    if (at < seen.begin || at >= seen.end) scores[at] = -__builtin_inff();
}

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

// ---- lanes -------------------------------------------------------------------------------------

struct VectorScratch {
  // [lanes, depth], as floats or as bfloat16.
  float* queries;
  // [keys, head_dim] each: widened keys and values.
  float* keys;
  float* values;
  // [lanes of a block, kScoresStride]: scores, then weights in the same place.
  float* scores;
  // [lanes of a block, head_dim]: of one chunk.
  float* sums;
  // [lanes, head_dim]: of the chunks before.
  float* totals;

  VectorScratch(float* at, int head_dim)
      : queries(at),
        keys(queries + kVectorLanes * round_up(head_dim, 2 * kWidth)),
        values(keys + kChunkKeys * head_dim),
        scores(values + kChunkKeys * head_dim),
        sums(scores + kLanesAtOnce * kScoresStride),
        totals(sums + kLanesAtOnce * head_dim) {}

  static int64_t floats(int head_dim) {
    return int64_t(kVectorLanes) * round_up(head_dim, 2 * kWidth) + kLanesAtOnce * kScoresStride +
           int64_t(2 * kChunkKeys + kLanesAtOnce + kVectorLanes) * head_dim;
  }
};

// The lanes of one unit and one KV head, and their softmax so far.
template <class KV>
class VectorLanes {
  typedef typename Operands<KV>::Element Element;

 public:
  static constexpr int kMost = kVectorLanes;

  VectorLanes(const Attention& a, int row, int head, int begin, int end, float* scratch)
      : a_(a), t_(scratch, a.head_dim), first_token_(a.query_starts[row]), head_(head),
        begin_(begin), count_(end - begin), depth_(round_up(a.head_dim, Operands<KV>::kDims)) {
    const int first_index = a.seq_lens[row] - (a.query_starts[row + 1] - first_token_);
    for (int lane = 0; lane < count_; ++lane) {
      last_keys_[lane] = first_index + (begin + lane) / a.group;
      shares_[lane] = {kNothingSeen, 0.0f};
      load_query(lane);
    }
    __builtin_memset(t_.totals, 0, int64_t(count_) * a.head_dim * sizeof(float));
  }

  // Chunks are added in their order. `is_next`: the next head of the chunk is read after it.
  void add(const Chunk& chunk, bool is_next) {
    const int64_t head_offset = int64_t(head_) * a_.head_dim;
    const KV* keys = (const KV*)a_.keys + head_offset;
    const KV* values = (const KV*)a_.values + head_offset;
    alignas(64) int64_t offsets[kChunkKeys];
    const int first = round_down(chunk.begin, kScoreKeys), last = round_up(chunk.end, kScoreKeys);
    for (int key = first; key < last; ++key)
      offsets[key] = chunk.offsets[smaller(larger(key, chunk.begin), chunk.end - 1)];
    if constexpr (sizeof(Element) > sizeof(KV)) {
      if (count_ >= kManyLanes) {
        widen(keys, offsets, first, last, t_.keys);
        widen(values, offsets, first, last, t_.values);
        for (int key = first; key < last; ++key) offsets[key] = key * a_.head_dim;
        return add_rows<Operands<float>>(
            chunk, HeadRows<float>{t_.keys, t_.values, nullptr, offsets, chunk.begin, chunk.end,
                                   false});
      }
    }
    add_rows<Operands<KV>>(chunk, HeadRows<KV>{keys, values, is_next ? keys + a_.head_dim : nullptr,
                                               offsets, chunk.begin, chunk.end, true});
  }

  // Writes the result, or a partial result that is merged with others later.
  void finish(const Unit& unit) const {
    for (int lane = 0; lane < count_; ++lane) {
      const float* totals = t_.totals + lane * a_.head_dim;
      if (unit.partial < 0)
        store_head(a_, token_of(lane), query_head(lane), totals, shares_[lane].total);
      else
        store_partial(a_, unit, query_head(lane), totals, shares_[lane]);
    }
  }

 private:
  int token_of(int lane) const { return first_token_ + (begin_ + lane) / a_.group; }
  int query_head(int lane) const { return head_ * a_.group + (begin_ + lane) % a_.group; }
  Element* query(int lane) const { return (Element*)t_.queries + lane * depth_; }

  void load_query(int lane) const {
    const int64_t from =
        token_of(lane) * a_.q.token_stride + query_head(lane) * a_.q.head_stride;
    for (int d = 0; d < depth_; d += kWidth) {
      const Vec q = d < a_.head_dim ? load_some(a_.q.data, a_.q.dtype, from + d, kWidth) : Vec{};
      store(query(lane) + d, q * a_.scale_log2e);
    }
  }

  void widen(const KV* pages, const int64_t* offsets, int begin, int end, float* to) const {
    for (int key = begin; key < end; ++key) {
      prefetch(pages + offsets[smaller(key + kKeysAhead, end - 1)], a_.head_dim);
      for (int d = 0; d < a_.head_dim; d += kWidth)
        store(to + key * a_.head_dim + d, load(pages + offsets[key] + d));
    }
  }

  template <class O, class Page>
  void add_rows(const Chunk& chunk, const HeadRows<Page>& rows) {
    for (int lane = 0; lane < count_; lane += kLanesAtOnce)
      add_block<O>(chunk, rows, lane, smaller(kLanesAtOnce, count_ - lane));
  }

  // Adds a chunk to up to sixteen lanes.
  template <class O, class Page>
  void add_block(const Chunk& chunk, const HeadRows<Page>& rows, int lane, int count) {
    const Seen block = {seen_by(lane, chunk).begin, seen_by(lane + count - 1, chunk).end};
    if (block.begin >= block.end) return;
    for (int key = round_down(block.begin, kScoreKeys); key < block.end; key += kTileKeys)
      score_tile<O>(rows, key, smaller(key + kTileKeys, block.end), lane, count);
    Share parts[kLanesAtOnce];
    softmax<O>(chunk, block, lane, count, parts);
    __builtin_memset(t_.sums, 0, int64_t(count) * a_.head_dim * sizeof(float));
    for (int key = round_down(block.begin, O::kKeys); key < block.end; key += kTileKeys)
      add_tile<O>(rows, key, smaller(key + kTileKeys, block.end), lane, count);
    for (int i = 0; i < count; ++i) {
      float* sums = t_.sums + i * a_.head_dim;
      O::restore_order(sums, a_.head_dim);
      add_part(shares_[lane + i], t_.totals + (lane + i) * a_.head_dim, parts[i], sums,
               a_.head_dim);
    }
  }

  // Scores of a tile of keys.
  template <class O, class Page>
  void score_tile(const HeadRows<Page>& rows, int begin, int end, int lane, int count) const {
    in_groups(count, [&](int first, auto group) {
      const auto run = a_.head_dim == 64    ? score_keys<O, group.lanes, 64, Page>
                       : a_.head_dim == 128 ? score_keys<O, group.lanes, 128, Page>
                                            : score_keys<O, group.lanes, 0, Page>;
      run(rows, begin, end, query(lane + first), a_.head_dim, t_.scores + first * kScoresStride,
          rows.is_far && lane + first == 0);
    });
  }

  // The keys that a lane sees, counted from a chunk's first.
  Seen seen_by(int lane, const Chunk& chunk) const {
    const int last = last_keys_[lane], first = larger(last - (a_.window - 1), 0);
    return {larger(first - chunk.first, chunk.begin), smaller(last - chunk.first + 1, chunk.end)};
  }

  template <class O>
  void softmax(const Chunk& chunk, Seen block, int lane, int count, Share* parts) const {
    const int from = round_down(block.begin, kWidth), to = round_up(block.end, kWidth);
    for (int i = 0; i < count; ++i)
      parts[i].largest =
          largest_score(t_.scores + i * kScoresStride, from, to, seen_by(lane + i, chunk));
    // A loop of its own, so that no iteration waits for the maximum it uses.
    for (int i = 0; i < count; ++i)
      parts[i].total = weigh<O>(t_.scores + i * kScoresStride, from, to, parts[i].largest);
  }

  // Adds the weighted values of a tile of keys to the sums of a block of lanes.
  template <class O, class Page>
  void add_tile(const HeadRows<Page>& rows, int begin, int end, int lane, int count) const {
    int d = 0;
    for (; d + kValueVectors * kWidth <= a_.head_dim; d += kValueVectors * kWidth)
      add_dims<O, kValueVectors>(rows, begin, end, lane, count, d);
    for (; d + 2 * kWidth <= a_.head_dim; d += 2 * kWidth)
      add_dims<O, 2>(rows, begin, end, lane, count, d);
    for (; d < a_.head_dim; d += kWidth) add_dims<O, 1>(rows, begin, end, lane, count, d);
  }

  template <class O, int kVectors, class Page>
  void add_dims(const HeadRows<Page>& rows, int begin, int end, int lane, int count,
                int d) const {
    in_groups(count, [&](int first, auto group) {
      const auto* weights = (const typename O::Element*)(t_.scores + first * kScoresStride);
      add_values<O, group.lanes, kVectors>(rows, begin, end, weights, d, a_.head_dim,
                                           t_.sums + first * a_.head_dim,
                                           rows.is_far && lane + first == 0);
    });
  }

  const Attention& a_;
  const VectorScratch t_;
  const int first_token_, head_, begin_, count_, depth_;
  // The last key that each lane sees: the stored index of its token.
  int last_keys_[kVectorLanes];
  Share shares_[kVectorLanes];
};

}  // namespace
