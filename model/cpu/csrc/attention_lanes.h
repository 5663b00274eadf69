// Attention by matrix instructions: lanes, and their softmax over chunks of keys. See
// attention_tiles.h.
#pragma once

#include "attention_tiles.h"
#include "attention_vectors.h"

#if defined(__AMX_BF16__)

namespace {

// ---- softmax -----------------------------------------------------------------------------------

// Sets the scores of keys outside [begin, end) to minus infinity.
inline void mask_outside(float* scores, int key, int begin, int end) {
  for (int at = key; at < key + kPairedKeys; at += kWidth) {
    const __m512i index = _mm512_add_epi32(
        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
        _mm512_set1_epi32(at));
    const __mmask16 hidden = _mm512_cmplt_epi32_mask(index, _mm512_set1_epi32(begin)) |
                             _mm512_cmpge_epi32_mask(index, _mm512_set1_epi32(end));
    _mm512_mask_storeu_ps(scores + at, hidden, _mm512_set1_ps(-__builtin_inff()));
  }
}

// Returns the largest score that a lane sees, and masks the others.
inline float largest_score(float* scores, Seen seen) {
  const int first = round_down(seen.begin, kPairedKeys), last = round_up(seen.end, kPairedKeys);
  if (seen.begin > first) mask_outside(scores, first, seen.begin, seen.end);
  if (seen.end < last) mask_outside(scores, last - kPairedKeys, seen.begin, seen.end);
  Vec even = broadcast(kNothingSeen), odd = even;
  for (int key = first; key < last; key += kPairedKeys) {
    even = max(load(scores + key), even);
    odd = max(load(scores + key + kWidth), odd);
  }
  return _mm512_reduce_max_ps(bit_cast<__m512>(max(even, odd)));
}

// Replaces one lane's scores by weights, and returns their sum. [from, to), both multiples of 32,
// are multiplied later: keys in it that the lane does not see get a weight of zero.
inline float softmax(float* scores, int from, int to, Seen seen, float largest) {
  BFloat16* weights = (BFloat16*)scores;
  const int first = round_down(seen.begin, kPairedKeys), last = round_up(seen.end, kPairedKeys);
  Vec even_total = {}, odd_total = {};
  for (int key = first; key < last; key += kPairedKeys) {
    const Vec even = exp2_coarse(load(scores + key) - largest);
    const Vec odd = exp2_coarse(load(scores + key + kWidth) - largest);
    even_total += even;
    odd_total += odd;
    store(weights + key, even, odd);
  }
  for (int key = from; key < first; key += kPairedKeys) store(weights + key, Vec{}, Vec{});
  for (int key = last; key < to; key += kPairedKeys) store(weights + key, Vec{}, Vec{});
  return _mm512_reduce_add_ps(bit_cast<__m512>(even_total + odd_total));
}

// ---- lanes -------------------------------------------------------------------------------------

// One KV head of a chunk. `next` points to the rows that are read after it, or is null.
template <class KV>
struct HeadChunk {
  const Chunk& chunk;
  const KV* keys;
  const KV* values;
  const KV* next;
};

// Up to sixteen lanes, and the keys of a chunk that at least one of them sees.
struct LaneBlock {
  int lane;
  int count;
  int begin;
  int end;
  // In whole tiles of weights.
  int from() const { return round_down(begin, kPairedKeys); }
  int to() const { return round_up(end, kPairedKeys); }
};

// The lanes of one unit and one KV head, and their softmax so far.
class Lanes {
 public:
  static constexpr int kMost = kTileLanes;

  Lanes(const Attention& a, int row, int head, int begin, int end, float* scratch)
      : a_(a), t_(scratch, a.head_dim), first_token_(a.query_starts[row]), head_(head),
        begin_(begin), count_(end - begin), depth_(TileScratch::depth(a.head_dim)) {
    const int first_index = a.seq_lens[row] - (a.query_starts[row + 1] - first_token_);
    for (int lane = 0; lane < count_; ++lane)
      last_keys_[lane] = first_index + (begin + lane) / a.group;
    const int padded = round_up(count_, kBlockLanes);
    // Unused lanes are zeros, and their results are never read.
    __builtin_memset(t_.queries + count_ * depth_, 0,
                     int64_t(padded - count_) * depth_ * sizeof(BFloat16));
    __builtin_memset(t_.totals, 0, int64_t(count_) * a.head_dim * sizeof(float));
    for (int lane = 0; lane < padded; lane += kWidth) {
      store(largest_ + lane, broadcast(kNothingSeen));
      store(total_ + lane, Vec{});
    }
  }

  // Sets the queries that meet the next chunks, and the window in which they see keys.
  void load_queries(const octavo::Rows& q, int window) {
    window_ = window;
    for (int lane = 0; lane < count_; ++lane) load_query(q, lane);
    if (is_few()) transpose_block(t_.queries, depth_, depth_, transposed_queries());
  }

  // Chunks are added in their order. `is_next`: the next head of the chunk is read after it.
  void add(const Chunk& chunk, bool is_next) {
    if (is_coded(a_.kv_dtype)) scales_.load(a_, chunk, head_);
    switch (a_.kv_dtype) {
      case kFloat16: return add_as<Float16>(chunk, is_next);
      case kFloat8: return add_as<Float8>(chunk, is_next);
      case kInt8: return add_as<int8_t>(chunk, is_next);
      case kInt4: return add_unpacked(chunk);
      default: return add_as<BFloat16>(chunk, is_next);
    }
  }

  // Writes the result, or a partial result that is merged with others later.
  void finish(const Unit& unit) const {
    for (int lane = 0; lane < count_; ++lane) {
      const float* sums = t_.totals + lane * a_.head_dim;
      const Share share = {largest_[lane], total_[lane]};
      if (unit.partial < 0)
        store_head(a_, token_of(lane), query_head(lane), sums, total_[lane]);
      else
        store_partial(a_, unit, query_head(lane), sums, share);
    }
  }

 private:
  bool is_few() const { return count_ <= kBlockLanes; }
  // Few lanes leave room after them.
  BFloat16* transposed_queries() const { return t_.queries + kBlockLanes * depth_; }
  int token_of(int lane) const { return first_token_ + (begin_ + lane) / a_.group; }
  int query_head(int lane) const { return head_ * a_.group + (begin_ + lane) % a_.group; }

  void load_query(const octavo::Rows& rows, int lane) {
    const int64_t from = token_of(lane) * rows.token_stride + query_head(lane) * rows.head_stride;
    BFloat16* to = t_.queries + lane * depth_;
    if (!is_coded(a_.kv_dtype)) {
      for (int d = 0; d < depth_; d += kWidth) store(to + d, query_part(a_, rows, from, d));
      return;
    }
    alignas(64) float q[octavo::kMaxHeadDim];
    read_query(a_, rows, from, depth_, q);
    for (int d = 0; d < depth_; d += kWidth) store(to + d, load(q + d));
    query_sums_[lane] = has_minimums(a_.kv_dtype) ? sum_of(to, depth_) : 0.0f;
  }

  template <class KV>
  void add_as(const Chunk& chunk, bool is_next) {
    const int64_t head_offset = int64_t(head_) * a_.head_dim;
    const KV* keys = (const KV*)a_.keys + head_offset;
    add_head(HeadChunk<KV>{chunk, keys, (const KV*)a_.values + head_offset,
                           is_next ? keys + a_.head_dim : nullptr});
  }

  // Rows of four bits, as bytes.
  void add_unpacked(const Chunk& chunk) {
    const int64_t head_offset = int64_t(head_) * a_.head_dim / 2;
    const auto unpack = [&](const void* pages, int8_t* to) {
      unpack_rows((const uint8_t*)pages + head_offset, chunk.offsets, chunk.begin, chunk.end,
                  a_.head_dim, to);
    };
    unpack(a_.keys, t_.key_codes);
    unpack(a_.values, t_.value_codes);
    Chunk rows = chunk;
    for (int key = chunk.begin; key < chunk.end; ++key) rows.offsets[key] = key * a_.head_dim;
    add_head(HeadChunk<int8_t>{rows, t_.key_codes, t_.value_codes, nullptr});
  }

  template <class KV>
  void add_head(const HeadChunk<KV>& c) {
    const Chunk& chunk = c.chunk;
    if (!is_few()) load_operands(c);
    for (int lane = 0; lane < count_; lane += kBlockLanes) {
      const int count = smaller(kBlockLanes, count_ - lane);
      const LaneBlock block = {lane, count, larger(seen_from(lane, chunk), chunk.begin),
                               smaller(seen_to(lane + count - 1, chunk), chunk.end)};
      if (block.begin >= block.end) continue;
      if (is_few())
        score_few(c);
      else
        score(block);
      add_block(c, block);
    }
  }

  // The keys that a lane sees, counted from a chunk's first: [seen_from, seen_to).
  int seen_from(int lane, const Chunk& chunk) const {
    return larger(last_keys_[lane] - (window_ - 1), 0) - chunk.first;
  }
  int seen_to(int lane, const Chunk& chunk) const { return last_keys_[lane] - chunk.first + 1; }

  // Sixteen keys as rows [16, depth]: in place where they are adjacent in one page. There the rows
  // outside the chunk's view may be NaN: each affects its own score alone, which is masked.
  template <class KV>
  const BFloat16* key_rows(const HeadChunk<KV>& c, int key, BFloat16* copy, int64_t* stride) const {
    if (a_.kv_dtype == kBFloat16 && a_.page_size % kBlockKeys == 0 && depth_ == a_.head_dim) {
      *stride = int64_t(a_.num_kv_heads) * a_.head_dim;
      return (const BFloat16*)(c.keys + c.chunk.offsets[key]);
    }
    *stride = depth_;
    copy_keys(c.keys, c.chunk, key, a_.head_dim, copy);
    return copy;
  }

  // Loads a chunk's keys and values as second operands, for many lanes.
  template <class KV>
  void load_operands(const HeadChunk<KV>& c) {
    int64_t stride;
    for (int key = round_down(c.chunk.begin, kBlockKeys); key < c.chunk.end; key += kBlockKeys) {
      // The sums are not in use yet.
      const BFloat16* rows = key_rows(c, key, (BFloat16*)t_.sums, &stride);
      transpose_block(rows, stride, depth_, t_.keys + key * depth_);
    }
    for (int key = round_down(c.chunk.begin, kPairedKeys); key < c.chunk.end; key += kPairedKeys)
      pair_values(c.values, c.chunk, key, 0, a_.head_dim, t_.values + key * a_.head_dim);
  }

  // Scores of a block of lanes against transposed keys.
  void score(const LaneBlock& block) {
    const int from = round_down(block.begin, kBlockKeys), to = round_up(block.end, kBlockKeys);
    const Tiles tiles = {t_.keys + from * depth_, kTileElements, int64_t(kBlockKeys) * depth_};
    multiply(t_.queries + block.lane * depth_, depth_ * sizeof(BFloat16), depth_, tiles,
             (to - from) / kBlockKeys, t_.scores + from, kScoresStride * sizeof(float));
  }

  // Scores of the only block of lanes against keys that are not transposed.
  template <class KV>
  void score_few(const HeadChunk<KV>& c) {
    const Tiles queries = {transposed_queries(), kTileElements, 0};
    alignas(64) float scores[kBlockKeys * kBlockLanes];
    int64_t stride;
    for (int key = round_down(c.chunk.begin, kBlockKeys); key < c.chunk.end; key += kBlockKeys) {
      const BFloat16* rows = key_rows(c, key, t_.keys, &stride);
      prefetch_block(c.keys, c.values, c.chunk, key, a_.head_dim);
      multiply(rows, stride * sizeof(BFloat16), depth_, queries, 1, scores, 64);
      if (count_ <= kFewLanes)
        transpose_few(scores, t_.scores + key);
      else
        transpose_words(scores, 64, t_.scores + key, kScoresStride * sizeof(float));
    }
  }

  // Adds a chunk to a block of lanes, whose scores are computed.
  template <class KV>
  void add_block(const HeadChunk<KV>& c, const LaneBlock& block) {
    alignas(64) float largest[kBlockLanes], total[kBlockLanes];
    Weighed weighed[kBlockLanes];
    store(largest, broadcast(kNothingSeen));
    store(total, Vec{});
    if (is_coded(a_.kv_dtype))
      softmax_codes(c.chunk, block, largest, total, weighed);
    else
      softmax_block(c.chunk, block, largest, total);
    if (is_few())
      sum_few(c, block);
    else
      sum(block);
    const int lane = block.lane;
    const Joint joint = join(load(largest_ + lane), load(largest));
    store(largest_ + lane, joint.largest);
    store(total_ + lane,
          multiply_add(load(total_ + lane), joint.first, load(total) * joint.second));
    for (int i = 0; i < block.count; ++i) {
      float* sums = t_.sums + i * a_.head_dim;
      if (has_minimums(a_.kv_dtype)) complete_sums(sums, a_.head_dim, weighed[i]);
      add_sums(sums, broadcast(joint.first[i]), broadcast(joint.second[i]),
               t_.totals + (lane + i) * a_.head_dim);
    }
  }

  Seen seen_by(int lane, const Chunk& chunk, const LaneBlock& block) const {
    const Seen seen = {larger(seen_from(lane, chunk), block.begin),
                       smaller(seen_to(lane, chunk), block.end)};
    // A window may have passed the whole chunk.
    return seen.begin < seen.end ? seen : Seen{block.from(), block.from()};
  }

  void softmax_codes(const Chunk& chunk, const LaneBlock& block, float* largest, float* total,
                     Weighed* weighed) {
    const int from = block.from(), to = block.to();
    for (int i = 0; i < block.count; ++i) {
      const int lane = block.lane + i;
      float* scores = t_.scores + i * kScoresStride;
      largest[i] = scale_scores(scores, from, to, seen_by(lane, chunk, block), scales_, 1.0f,
                                query_sums_[lane]);
      weighed[i] = weigh_scaled<Operands<BFloat16>>(scores, from, to, largest[i], scales_);
      total[i] = weighed[i].total;
    }
  }

  void softmax_block(const Chunk& chunk, const LaneBlock& block, float* largest, float* total) {
    Seen seen[kBlockLanes];
    for (int i = 0; i < block.count; ++i) {
      seen[i] = seen_by(block.lane + i, chunk, block);
      largest[i] = largest_score(t_.scores + i * kScoresStride, seen[i]);
    }
    // A loop of its own, so that no iteration waits for the maximum it uses.
    const int from = block.from(), to = block.to();
    for (int i = 0; i < block.count; ++i)
      total[i] = softmax(t_.scores + i * kScoresStride, from, to, seen[i], largest[i]);
  }

  const BFloat16* weights() const { return (const BFloat16*)t_.scores; }
  static constexpr int64_t kWeightsBytes = kScoresStride * sizeof(float);

  // The weights of a block of lanes times paired values.
  void sum(const LaneBlock& block) {
    const Tiles tiles = {t_.values + block.from() * a_.head_dim,
                         int64_t(kPairedKeys) * a_.head_dim, kTileElements};
    multiply(weights() + block.from(), kWeightsBytes, block.to() - block.from(), tiles,
             a_.head_dim / kTileOutputs, t_.sums, a_.head_dim * sizeof(float));
  }

  // The same, pairing values just before they are multiplied, while they are in the nearest cache.
  template <class KV>
  void sum_few(const HeadChunk<KV>& c, const LaneBlock& block) {
    int d = 0;
    for (; d + 4 * kTileOutputs <= a_.head_dim; d += 4 * kTileOutputs) sum_few<4>(c, block, d);
    // Two tiles share an order of dimensions.
    for (; d + 2 * kTileOutputs <= a_.head_dim; d += 2 * kTileOutputs) sum_few<2>(c, block, d);
    if (d < a_.head_dim) sum_few<1>(c, block, d);
  }

  template <int kSides, class KV>
  void sum_few(const HeadChunk<KV>& c, const LaneBlock& block, int d) {
    alignas(64) BFloat16 tiles[2][kSides * kTileElements];
    const auto pair = [&](int key) {
      pair_values(c.values, c.chunk, key, d, kSides * kTileOutputs, tiles[key / kPairedKeys % 2]);
      written_before();
    };
    zero_accumulators();
    pair(block.from());
    for (int key = block.from(); key < block.to(); key += kPairedKeys) {
      // Loading a tile waits for stores to it: the next tile is written in between.
      if (key + kPairedKeys < block.to()) pair(key + kPairedKeys);
      if (d == 0)
        for (int i = 0; i < kPairedKeys; i += kBlockKeys)
          prefetch_block(c.values, c.next, c.chunk, key + i, a_.head_dim);
      const BFloat16* paired = tiles[key / kPairedKeys % 2];
      add_tiles<kSides>(weights() + key, kWeightsBytes, paired, kTileElements);
    }
    store_sums<kSides>(t_.sums + d, a_.head_dim * sizeof(float));
  }

  void add_sums(const float* sums, Vec first, Vec second, float* totals) const {
    int d = 0;
    for (; d + 2 * kWidth <= a_.head_dim; d += 2 * kWidth) {
      Vec low = load(sums + d), high = load(sums + d + kWidth);
      restore_order(&low, &high);
      store(totals + d, multiply_add(load(totals + d), first, low * second));
      store(totals + d + kWidth, multiply_add(load(totals + d + kWidth), first, high * second));
    }
    if (d < a_.head_dim)
      store(totals + d, multiply_add(load(totals + d), first, load(sums + d) * second));
  }

  const Attention& a_;
  const TileScratch t_;
  const int first_token_, head_, begin_, count_, depth_;
  int window_ = octavo::kAllKeys;
  // The last key that each lane sees: the stored index of its token.
  int last_keys_[kTileLanes];
  alignas(64) float largest_[kTileLanes];
  alignas(64) float total_[kTileLanes];
  // Of codes alone.
  HeadScales scales_;
  float query_sums_[kTileLanes];
};

}  // namespace

#endif
