// Attention by vectors: lanes, and their softmax over chunks of keys. See attention_vectors.h.
#pragma once

#include "attention_pages.h"
#include "attention_words.h"

namespace {

using octavo::kVectorLanes;

// Lanes whose softmax is computed while a chunk's keys and values are in a near cache.
constexpr int kLanesAtOnce = 4 * kLaneGroup;
// From so many lanes on it pays to widen keys and values once for all of them.
constexpr int kManyLanes = 2 * kLaneGroup;

struct VectorScratch {
  // [lanes, depth], as floats or as bfloat16.
  float* queries;
  // [keys, head_dim] each: widened keys and values.
  float* keys;
  float* values;
  // The same: codes of a byte, unpacked from fewer bits.
  int8_t* key_codes;
  int8_t* value_codes;
  // [lanes of a block, kScoresStride]: scores, then weights in the same place.
  float* scores;
  // [lanes of a block, head_dim]: of one chunk.
  float* sums;
  // [lanes, head_dim]: of the chunks before.
  float* totals;
  // Of codes alone. Not in the lanes themselves: a large frame of the stack costs those of floats.
  HeadScales* scales;

  VectorScratch(float* at, int head_dim)
      : queries(at),
        keys(queries + kVectorLanes * round_up(head_dim, 2 * kWidth)),
        values(keys + kChunkKeys * head_dim),
        key_codes((int8_t*)(values + kChunkKeys * head_dim)),
        value_codes(key_codes + kChunkKeys * head_dim),
        scores((float*)(value_codes + kChunkKeys * head_dim)),
        sums(scores + kLanesAtOnce * kScoresStride),
        totals(sums + kLanesAtOnce * head_dim),
        scales((HeadScales*)(totals + kVectorLanes * head_dim)) {}

  static int64_t floats(int head_dim) {
    return int64_t(kVectorLanes) * round_up(head_dim, 2 * kWidth) + kLanesAtOnce * kScoresStride +
           int64_t(2 * kChunkKeys + kLanesAtOnce + kVectorLanes) * head_dim +
           kChunkKeys * head_dim / 2 + sizeof(HeadScales) / sizeof(float);
  }
};

// The lanes of one unit and one KV head, and their softmax so far.
template <class KV>
class VectorLanes {
  typedef typename Operands<KV>::Element Element;
  static constexpr bool kIsCoded = sizeof(KV) == 1;
  static constexpr bool kIsByPage = __is_same(KV, WholePages);

 public:
  static constexpr int kMost = kVectorLanes;

  VectorLanes(const Attention& a, int row, int head, int begin, int end, float* scratch)
      : a_(a), t_(scratch, a.head_dim), first_token_(a.query_starts[row]), row_(row), head_(head),
        begin_(begin), count_(end - begin), depth_(round_up(a.head_dim, Operands<KV>::kDims)) {
    const int first_index = a.seq_lens[row] - (a.query_starts[row + 1] - first_token_);
    for (int lane = 0; lane < count_; ++lane) {
      last_keys_[lane] = first_index + (begin + lane) / a.group;
      shares_[lane] = {kNothingSeen, 0.0f};
    }
    __builtin_memset(t_.totals, 0, int64_t(count_) * a.head_dim * sizeof(float));
  }

  // Sets the queries that meet the next chunks, and the window in which they see keys.
  void load_queries(const octavo::Rows& q, int window) {
    window_ = window;
    for (int lane = 0; lane < count_; ++lane) load_query(q, lane);
  }

  // Chunks are added in their order. `is_next`: the next head of the chunk is read after it.
  void add(const Chunk& chunk, bool is_next) {
    if constexpr (kIsByPage)
      add_pages(chunk);
    else
      add_tokens(chunk, is_next);
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
  // Sets the offsets of a chunk's keys, those of whole steps of the products included.
  template <class OffsetOf>
  static void locate(const Chunk& chunk, int64_t* offsets, const OffsetOf& offset_of) {
    const int first = round_down(chunk.begin, kScoreKeys), last = round_up(chunk.end, kScoreKeys);
    for (int key = first; key < last; ++key)
      offsets[key] = offset_of(smaller(larger(key, chunk.begin), chunk.end - 1));
  }

  void add_pages(const Chunk& chunk) {
    const bool is_one_block = count_ <= kLanesAtOnce;
    const int own_begin = round_down(last_keys_[0], a_.page_size);
    const PageRows<Element> pages(a_, row_, head_, own_begin, chunk,
                                  is_one_block ? kTileKeys : kChunkKeys);
    alignas(64) int64_t offsets[kChunkKeys];
    locate(chunk, offsets, [&](int key) { return pages.offset(key); });
    const HeadRows<Element> rows = {(Element*)t_.keys, (Element*)t_.values, nullptr, offsets,
                                    chunk.begin, chunk.end, false};
    if (is_one_block)
      return add_rows<Operands<Element>>(chunk, TiledRows<Element>(pages, rows));
    pages.read(chunk.begin, chunk.end, false, (Element*)t_.keys);
    pages.read(chunk.begin, chunk.end, true, (Element*)t_.values);
    add_rows<Operands<Element>>(chunk, rows);
  }

  void add_tokens(const Chunk& chunk, bool is_next) {
    alignas(64) int64_t offsets[kChunkKeys];
    const int first = round_down(chunk.begin, kScoreKeys), last = round_up(chunk.end, kScoreKeys);
    locate(chunk, offsets, [&](int key) { return chunk.offsets[key]; });
    const bool is_packed = kIsCoded && a_.kv_dtype == kInt4;
    const int64_t head_offset = int64_t(head_) * a_.head_dim >> is_packed;
    HeadRows<KV> rows = {(const KV*)a_.keys + head_offset, (const KV*)a_.values + head_offset,
                         nullptr, offsets, chunk.begin, chunk.end, true};
    if (is_next) rows.next = rows.keys + a_.head_dim;
    if constexpr (kIsCoded) t_.scales->load(a_, chunk, head_);
    if constexpr (Operands<KV>::kIsWidened)
      if (count_ >= kManyLanes)
        return add_rows<Operands<Element>>(chunk, widened(rows, offsets, first, last));
    if constexpr (kIsCoded)
      if (is_packed) rows = unpacked(rows, offsets, first, last);
    add_rows<Operands<KV>>(chunk, rows);
  }

  int token_of(int lane) const { return first_token_ + (begin_ + lane) / a_.group; }
  int query_head(int lane) const { return head_ * a_.group + (begin_ + lane) % a_.group; }
  Element* query(int lane) const { return (Element*)t_.queries + lane * depth_; }

  void load_query(const octavo::Rows& rows, int lane) {
    const int64_t from = token_of(lane) * rows.token_stride + query_head(lane) * rows.head_stride;
    if constexpr (kIsCoded) {
      alignas(64) float q[octavo::kMaxHeadDim];
      read_query(a_, rows, from, depth_, q);
      query_factors_[lane] = Operands<KV>::store_query(q, depth_, query(lane));
      query_sums_[lane] =
          has_minimums(a_.kv_dtype) ? query_factors_[lane] * sum_of(query(lane), depth_) : 0.0f;
    } else {
      for (int d = 0; d < depth_; d += kWidth)
        store(query(lane) + d, query_part(a_, rows, from, d));
    }
  }

  // The same rows of bytes instead of packed ones. `offsets` become those of the unpacked rows.
  HeadRows<KV> unpacked(HeadRows<KV> rows, int64_t* offsets, int begin, int end) const {
    const auto unpack = [&](const KV* pages, int8_t* to) {
      unpack_rows((const uint8_t*)pages, offsets, begin, end, a_.head_dim, to);
    };
    unpack(rows.keys, t_.key_codes);
    unpack(rows.values, t_.value_codes);
    for (int key = begin; key < end; ++key) offsets[key] = key * a_.head_dim;
    return {(const KV*)t_.key_codes, (const KV*)t_.value_codes, nullptr, offsets, rows.begin,
            rows.end, false};
  }

  // The same rows, of bytes or packed, as elements.
  HeadRows<Element> widened(const HeadRows<KV>& rows, int64_t* offsets, int begin, int end) const {
    Element *keys = (Element*)t_.keys, *values = (Element*)t_.values;
    widen(rows.keys, offsets, begin, end, keys);
    widen(rows.values, offsets, begin, end, values);
    for (int key = begin; key < end; ++key) offsets[key] = key * a_.head_dim;
    return {keys, values, nullptr, offsets, rows.begin, rows.end, false};
  }

  void widen(const KV* pages, const int64_t* offsets, int begin, int end, Element* to) const {
    alignas(64) int8_t bytes[octavo::kMaxHeadDim];
    for (int key = begin; key < end; ++key) {
      prefetch(pages + offsets[smaller(key + kKeysAhead, end - 1)], a_.head_dim);
      const KV* row = pages + offsets[key];
      if (kIsCoded && a_.kv_dtype == kInt4) {
        unpack_row((const uint8_t*)row, a_.head_dim, bytes);
        row = (const KV*)bytes;
      }
      for (int d = 0; d < a_.head_dim; d += kWidth)
        Operands<KV>::widen(row + d, to + key * a_.head_dim + d);
    }
  }

  template <class O, class Rows>
  void add_rows(const Chunk& chunk, const Rows& rows) {
    for (int lane = 0; lane < count_; lane += kLanesAtOnce)
      add_block<O>(chunk, rows, lane, smaller(kLanesAtOnce, count_ - lane));
  }

  // Adds a chunk to up to sixteen lanes.
  template <class O, class Rows>
  void add_block(const Chunk& chunk, const Rows& rows, int lane, int count) {
    const Seen block = {seen_by(lane, chunk).begin, seen_by(lane + count - 1, chunk).end};
    if (block.begin >= block.end) return;
    for (int key = round_down(block.begin, kScoreKeys); key < block.end; key += kTileKeys) {
      const int end = smaller(key + kTileKeys, block.end);
      rows.bring_keys(key, end);
      score_tile<O>(rows, key, end, lane, count);
    }
    Share parts[kLanesAtOnce];
    Weighed weighed[kLanesAtOnce];
    softmax<O>(chunk, block, lane, count, parts, weighed);
    __builtin_memset(t_.sums, 0, int64_t(count) * a_.head_dim * sizeof(float));
    for (int key = round_down(block.begin, O::kKeys); key < block.end; key += kTileKeys) {
      const int end = smaller(key + kTileKeys, block.end);
      rows.bring_values(key, end);
      add_tile<O>(rows, key, end, lane, count);
    }
    for (int i = 0; i < count; ++i) {
      float* sums = t_.sums + i * a_.head_dim;
      O::restore_order(sums, a_.head_dim);
      if constexpr (kIsCoded) complete_sums(sums, a_.head_dim, weighed[i]);
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
    const int last = last_keys_[lane], first = larger(last - (window_ - 1), 0);
    return {larger(first - chunk.first, chunk.begin), smaller(last - chunk.first + 1, chunk.end)};
  }

  template <class O>
  void softmax(const Chunk& chunk, Seen block, int lane, int count, Share* parts,
               Weighed* weighed) const {
    const int from = round_down(block.begin, kWidth), to = round_up(block.end, kWidth);
    for (int i = 0; i < count; ++i) {
      float* scores = t_.scores + i * kScoresStride;
      const Seen seen = seen_by(lane + i, chunk);
      if constexpr (kIsCoded)
        parts[i].largest = scale_scores(scores, from, to, seen, *t_.scales,
                                        query_factors_[lane + i], query_sums_[lane + i]);
      else
        parts[i].largest = largest_score(scores, from, to, seen);
    }
    // A loop of its own, so that no iteration waits for the maximum it uses.
    for (int i = 0; i < count; ++i) {
      float* scores = t_.scores + i * kScoresStride;
      if constexpr (kIsCoded) {
        weighed[i] = weigh_scaled<O>(scores, from, to, parts[i].largest, *t_.scales);
        parts[i].total = weighed[i].total;
      } else {
        parts[i].total = weigh<O>(scores, from, to, parts[i].largest);
      }
    }
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
  const int first_token_, row_, head_, begin_, count_, depth_;
  int window_ = octavo::kAllKeys;
  // The last key that each lane sees: the stored index of its token.
  int last_keys_[kVectorLanes];
  Share shares_[kVectorLanes];
  // Of codes alone.
  float query_factors_[kVectorLanes];
  float query_sums_[kVectorLanes];
};

}  // namespace
