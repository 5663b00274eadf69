// Attention by matrix instructions, for keys and values kept in 16 bits: operands are bfloat16, sums
// are float32.
//
// Lanes are the (token, head) pairs of one KV head, sixteen to a tile. A chunk of 256 keys, counted
// from the sequence's first, is one plain softmax: scores, weights, and their sum over the values;
// chunks are joined in their order. A lane's sums run along its own row, so its result is the same to
// the bit whatever the lanes beside it: computed alone, in a prompt, or in any piece of one.
//
// A second operand has the pairs of what is summed over side by side. Of values these are two keys'
// rows, which interleave. Of keys they would be two dimensions of a row, which takes a transposition:
// worth it for many lanes. For few the queries are transposed instead, keys are a first operand as
// they lie in their pages, and the scores are turned back: the same sums in the same order.
#pragma once

#include "attention_decode.h"
#include "products.h"

#if defined(__AMX_BF16__)

namespace {

using octavo::kPrefillLanes;

constexpr int kChunkKeys = kDecodeKeys;
constexpr int kBlockLanes = kTileOutputs;
constexpr int kBlockKeys = kTileOutputs;
constexpr int kPairedKeys = kTileInputs;
// What is read once is asked for this far ahead.
constexpr int kBlocksAhead = 4;
// Floats from a lane's scores to the next lane's: a line more than they are, lest all begin in the
// same sets of the cache.
constexpr int kScoresStride = kChunkKeys + 16;

inline int round_down(int value, int multiple) { return value / multiple * multiple; }
inline int round_up(int value, int multiple) { return round_down(value + multiple - 1, multiple); }

// The keys of a chunk that some lane sees, counted from the chunk's first, and where they lie.
struct Chunk {
  int first;
  int begin;
  int end;
  // Of whole blocks of keys; what lies before `begin` and from `end` on is not to be trusted.
  int64_t offsets[kChunkKeys];

  Chunk(const Attention& a, int row, int chunk_first, int key_begin, int key_end)
      : first(chunk_first),
        begin(larger(key_begin - first, 0)),
        end(smaller(key_end - first, kChunkKeys)) {
    const int from = round_down(begin, kBlockKeys);
    locate_keys(a, row, first + from, first + end, offsets + from);
  }
};

struct TileScratch {
  // [lanes, depth]; for few lanes tiles of the second operand.
  BFloat16* queries;
  // [keys, depth], or tiles of the second operand [blocks of keys, tiles of depth].
  BFloat16* keys;
  // Tiles of the second operand [pairs of blocks of keys, blocks of dimensions].
  BFloat16* values;
  // [lanes of a block, kScoresStride]: scores, then weights as bfloat16 in the same place.
  float* scores;
  // [lanes of a block, head_dim]: of one chunk.
  float* sums;
  // [lanes, head_dim]: of the chunks before.
  float* totals;

  static int depth(int head_dim) { return round_up(head_dim, kTileInputs); }

  TileScratch(float* at, int head_dim)
      : queries((BFloat16*)at),
        keys(queries + kPrefillLanes * depth(head_dim)),
        values(keys + kChunkKeys * depth(head_dim)),
        scores((float*)(values + kChunkKeys * head_dim)),
        sums(scores + kBlockLanes * kScoresStride),
        totals(sums + kBlockLanes * head_dim) {}

  static int64_t floats(int head_dim) {
    return (int64_t(kPrefillLanes + kChunkKeys) * depth(head_dim) + kChunkKeys * head_dim) / 2 +
           kBlockLanes * kScoresStride + int64_t(kBlockLanes + kPrefillLanes) * head_dim;
  }
};

// ---- how operands come to lie ------------------------------------------------------------------

// Sixteen rows of sixteen words, transposed.
inline void transpose(__m512i* rows) {
  __m512i t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 4) {
    rows[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    rows[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    rows[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    rows[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 4; ++i)
#pragma GCC unroll 16
    for (int j = 0; j < 16; j += 8) {
      t[i + j] = _mm512_shuffle_i32x4(rows[i + j], rows[i + j + 4], 0x88);
      t[i + j + 4] = _mm512_shuffle_i32x4(rows[i + j], rows[i + j + 4], 0xdd);
    }
#pragma GCC unroll 16
  for (int i = 0; i < 8; ++i) {
    rows[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    rows[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
}

// The same in memory: pairs of bfloat16, or floats.
inline void turn(const void* from, int64_t from_bytes, void* to, int64_t to_bytes) {
  __m512i rows[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) rows[i] = _mm512_loadu_si512((const char*)from + i * from_bytes);
  transpose(rows);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) _mm512_storeu_si512((char*)to + i * to_bytes, rows[i]);
}

// Rows of one block, [16, depth], as tiles of the second operand.
inline void turn_block(const BFloat16* rows, int64_t stride, int depth, BFloat16* tiles) {
  for (int d = 0; d < depth; d += kTileInputs, tiles += kTileElements)
    turn(rows + d, stride * sizeof(BFloat16), tiles, 64);
}

inline __m512i load_32(const BFloat16* from) { return _mm512_loadu_si512(from); }
inline __m512i load_32(const Float16* from) {
  const Vec first = load(from), second = load(from + kWidth);
  return (__m512i)_mm512_cvtne2ps_pbh(bit_cast<__m512>(second), bit_cast<__m512>(first));
}

// Asks for a block of rows some way ahead of `key`; past the chunk for those that are read `next`.
template <class KV>
inline void prefetch_block(const KV* pages, const KV* next, const Chunk& chunk, int key,
                           int head_dim) {
  const int begin = round_down(chunk.begin, kBlockKeys), end = chunk.end;
  int ahead = key + kBlocksAhead * kBlockKeys;
  if (ahead >= end) ahead += begin - round_up(end, kBlockKeys), pages = next;
  if (!pages || ahead >= end) return;
  const int last = smaller(ahead + kBlockKeys, end);
  for (; ahead < last; ++ahead) prefetch(pages + chunk.offsets[ahead], head_dim);
}

// Two rows of floats side by side as pairs of bfloat16.
inline __m512i pairs_of(Vec even, Vec odd) {
  const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(bit_cast<__m512>(even)));
  const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(bit_cast<__m512>(odd)));
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

// What stands for keys that nobody may read: zeros, for what is there may be NaN.
template <class KV>
inline const KV* row_of(const KV* pages, const Chunk& chunk, int key) {
  alignas(64) static const KV zeros[octavo::kMaxHeadDim] = {};
  return key >= chunk.begin && key < chunk.end ? pages + chunk.offsets[key] : zeros;
}

// One block of keys to [16, depth].
template <class KV>
inline void copy_keys(const KV* pages, const Chunk& chunk, int block, int head_dim, BFloat16* to) {
  for (int key = block; key < block + kBlockKeys; ++key) {
    const KV* row = row_of(pages, chunk, key);
    int d = 0;
    for (; d + kTileInputs <= head_dim; d += kTileInputs, to += kTileInputs)
      _mm512_storeu_si512(to, load_32(row + d));
    if (d < head_dim) store(to, load(row + d), Vec{}), to += kTileInputs;
  }
}

// Tiles of the values of 32 keys, `count` dimensions from the row's `d` on. Two rows interleave within
// the quarters of a vector, which is one instruction and leaves 32 dimensions in an order of their
// own: `in_order` undoes it in the sums.
template <class KV>
inline void pair_values(const KV* pages, const Chunk& chunk, int keys, int d, int count,
                        BFloat16* to) {
  for (int key = keys; key < keys + kPairedKeys; key += 2, to += kTileInputs) {
    const KV* even = row_of(pages, chunk, key) + d;
    const KV* odd = row_of(pages, chunk, key + 1) + d;
    BFloat16* tile = to;
    int i = 0;
    for (; i + kTileInputs <= count; i += kTileInputs, tile += 2 * kTileElements) {
      const __m512i first = load_32(even + i), second = load_32(odd + i);
      _mm512_storeu_si512(tile, _mm512_unpacklo_epi16(first, second));
      _mm512_storeu_si512(tile + kTileElements, _mm512_unpackhi_epi16(first, second));
    }
    if (i < count) _mm512_storeu_si512(tile, pairs_of(load(even + i), load(odd + i)));
  }
}

// The sums of 32 dimensions as `pair_values` left them.
inline void in_order(Vec* low, Vec* high) {
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  const __m512 x = bit_cast<__m512>(*low), y = bit_cast<__m512>(*high);
  *low = bit_cast<Vec>(_mm512_permutex2var_ps(x, first, y));
  *high = bit_cast<Vec>(_mm512_permutex2var_ps(x, second, y));
}

// ---- products ----------------------------------------------------------------------------------

// Tiles of the second operand: elements to the next along the depth, and to the next side.
struct Tiles {
  const BFloat16* at;
  int64_t next;
  int64_t side;
};

// Adds one tile of the first operand times up to four of the second, side by side, to as many sums.
template <int kSides>
inline void add_tiles(const BFloat16* first, int64_t first_bytes, const BFloat16* second,
                      int64_t side) {
  _tile_loadd(4, first, first_bytes);
  _tile_loadd(5, second, 64);
  _tile_dpbf16ps(0, 4, 5);
  if constexpr (kSides > 1) {
    _tile_loadd(6, second + side, 64);
    _tile_dpbf16ps(1, 4, 6);
  }
  if constexpr (kSides > 2) {
    _tile_loadd(7, second + 2 * side, 64);
    _tile_dpbf16ps(2, 4, 7);
    _tile_loadd(5, second + 3 * side, 64);
    _tile_dpbf16ps(3, 4, 5);
  }
}

template <int kSides>
inline void store_sums(float* out, int64_t out_bytes) {
  _tile_stored(0, out, out_bytes);
  if constexpr (kSides > 1) _tile_stored(1, out + kTileOutputs, out_bytes);
  if constexpr (kSides > 2) {
    _tile_stored(2, out + 2 * kTileOutputs, out_bytes);
    _tile_stored(3, out + 3 * kTileOutputs, out_bytes);
  }
  written_before();
}

// out[row][side * 16 + column] = Σ_depth first[row][depth] * second[depth][side * 16 + column].
template <int kSides>
inline void multiply_sides(const BFloat16* first, int64_t first_bytes, int depth, Tiles second,
                           float* out, int64_t out_bytes) {
  written_before();
  zero_accumulators();
  for (int k = 0; k < depth; k += kTileInputs, second.at += second.next)
    add_tiles<kSides>(first + k, first_bytes, second.at, second.side);
  store_sums<kSides>(out, out_bytes);
}

// The same for any number of sides.
inline void multiply(const BFloat16* first, int64_t first_bytes, int depth, Tiles second, int sides,
                     float* out, int64_t out_bytes) {
  for (; sides >= 4; sides -= 4, second.at += 4 * second.side, out += 4 * kTileOutputs)
    multiply_sides<4>(first, first_bytes, depth, second, out, out_bytes);
  for (; sides; --sides, second.at += second.side, out += kTileOutputs)
    multiply_sides<1>(first, first_bytes, depth, second, out, out_bytes);
}

// Weights times the values of keys [from, to), up to four tiles of dimensions from `d` on. Values
// are paired as they are multiplied, while what is made of them is in the nearest cache.
template <int kSides, class KV>
inline void multiply_values(const BFloat16* weights, int64_t weights_bytes, const KV* values,
                            const KV* next, const Chunk& chunk, int from, int to, int d, float* out,
                            int64_t out_bytes) {
  alignas(64) BFloat16 tiles[2][kSides * kTileElements];
  const auto pair = [&](int key) {
    pair_values(values, chunk, key, d, kSides * kTileOutputs, tiles[key / kPairedKeys % 2]);
    written_before();
  };
  zero_accumulators();
  pair(from);
  for (int key = from; key < to; key += kPairedKeys) {
    // A tile does not load what is still on its way to the cache: the next one's are on it meanwhile.
    if (key + kPairedKeys < to) pair(key + kPairedKeys);
    for (int block = key; block < key + kPairedKeys; block += kBlockKeys)
      prefetch_block(values + d, next, chunk, block, kSides * kTileOutputs);
    add_tiles<kSides>(weights + key, weights_bytes, tiles[key / kPairedKeys % 2], kTileElements);
  }
  store_sums<kSides>(out, out_bytes);
}

// Scores [16 keys, 16 lanes] of up to four lanes to [lanes, kScoresStride].
inline void turn_few(const float* scores, float* to) {
  __m512 rows[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const float* at = scores + i * kBlockLanes;
    __m512 row = _mm512_castps128_ps512(_mm_load_ps(at));
    row = _mm512_insertf32x4(row, _mm_load_ps(at + 4 * kBlockLanes), 1);
    row = _mm512_insertf32x4(row, _mm_load_ps(at + 8 * kBlockLanes), 2);
    rows[i] = _mm512_insertf32x4(row, _mm_load_ps(at + 12 * kBlockLanes), 3);
  }
  const __m512d low = _mm512_castps_pd(_mm512_unpacklo_ps(rows[0], rows[1]));
  const __m512d high = _mm512_castps_pd(_mm512_unpackhi_ps(rows[0], rows[1]));
  const __m512d next_low = _mm512_castps_pd(_mm512_unpacklo_ps(rows[2], rows[3]));
  const __m512d next_high = _mm512_castps_pd(_mm512_unpackhi_ps(rows[2], rows[3]));
  _mm512_store_pd(to, _mm512_unpacklo_pd(low, next_low));
  _mm512_store_pd(to + kScoresStride, _mm512_unpackhi_pd(low, next_low));
  _mm512_store_pd(to + 2 * kScoresStride, _mm512_unpacklo_pd(high, next_high));
  _mm512_store_pd(to + 3 * kScoresStride, _mm512_unpackhi_pd(high, next_high));
}

// ---- softmax -----------------------------------------------------------------------------------

// 2 to the power of x, which is not above 0, to 3e-6 relative: weights are rounded to bfloat16.
inline Vec weight_of(Vec x) {
  const Vec magic = broadcast(12582912.0f);
  const Vec shifted = x + magic;
  const Vec r = x - (shifted - magic);
  Vec p = broadcast(9.582853095e-3f);
  p = p * r + 5.590642460e-2f;
  p = p * r + 2.402409861e-1f;
  p = p * r + 6.931241934e-1f;
  p = p * r + 1.0f;
  const Vec power = bit_cast<Vec>(bit_cast<IntVec>(p) + (bit_cast<IntVec>(shifted) << 23));
  // NaN stays what it is.
  return bit_cast<Vec>(bit_cast<IntVec>(power) & ~(x < -126.0f));
}

// Scores of keys outside [begin, end) become the least there is.
inline void hide(float* scores, int key, int begin, int end) {
  for (int at = key; at < key + kPairedKeys; at += kWidth) {
    const __m512i index = _mm512_add_epi32(
        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
        _mm512_set1_epi32(at));
    const __mmask16 hidden = _mm512_cmplt_epi32_mask(index, _mm512_set1_epi32(begin)) |
                             _mm512_cmpge_epi32_mask(index, _mm512_set1_epi32(end));
    _mm512_mask_storeu_ps(scores + at, hidden, _mm512_set1_ps(-__builtin_inff()));
  }
}

// What one lane sees of a chunk, [begin, end), and the same in whole pairs of blocks.
struct Seen {
  int begin;
  int end;
  int first() const { return round_down(begin, kPairedKeys); }
  int last() const { return round_up(end, kPairedKeys); }
};

// The largest score a lane sees. What it does not see is hidden from then on.
inline float largest_score(float* scores, Seen seen) {
  const int first = seen.first(), last = seen.last();
  if (seen.begin > first) hide(scores, first, seen.begin, seen.end);
  if (seen.end < last) hide(scores, last - kPairedKeys, seen.begin, seen.end);
  Vec even = broadcast(kNothingSeen), odd = even;
  for (int key = first; key < last; key += kPairedKeys) {
    even = max(load(scores + key), even);
    odd = max(load(scores + key + kWidth), odd);
  }
  return _mm512_reduce_max_ps(bit_cast<__m512>(max(even, odd)));
}

// One lane's scores to weights, in place, and their sum. [from, to) are multiplied, both multiples
// of 32: what the lane does not see of them weighs nothing, and adds nothing to a sum.
inline float weigh(float* scores, int from, int to, Seen seen, float largest) {
  BFloat16* weights = (BFloat16*)scores;
  const int first = seen.first(), last = seen.last();
  Vec even_total = {}, odd_total = {};
  for (int key = first; key < last; key += kPairedKeys) {
    const Vec even = weight_of(load(scores + key) - largest);
    const Vec odd = weight_of(load(scores + key + kWidth) - largest);
    even_total += even;
    odd_total += odd;
    store(weights + key, even, odd);
  }
  for (int key = from; key < first; key += kPairedKeys) store(weights + key, Vec{}, Vec{});
  for (int key = last; key < to; key += kPairedKeys) store(weights + key, Vec{}, Vec{});
  return _mm512_reduce_add_ps(bit_cast<__m512>(even_total + odd_total));
}

// ---- lanes -------------------------------------------------------------------------------------

// The lanes of one unit and one KV head, and their softmax so far.
class Lanes {
 public:
  Lanes(const Attention& a, int row, int head, int begin, int end, float* scratch)
      : a_(a), t_(scratch, a.head_dim), row_(row), head_(head), begin_(begin), count_(end - begin),
        depth_(TileScratch::depth(a.head_dim)) {
    const int first_token = a.query_starts[row];
    const int first_position = a.seq_lens[row] - (a.query_starts[row + 1] - first_token);
    for (int lane = 0; lane < count_; ++lane) {
      const int token = (begin + lane) / a.group;
      positions_[lane] = first_position + token;
      load_query(first_token + token, query_head(lane), t_.queries + int64_t(lane) * depth_);
    }
    const int padded = round_up(count_, kBlockLanes);
    // Lanes that are nobody's are zeros, and what becomes of them is never looked at.
    __builtin_memset(t_.queries + int64_t(count_) * depth_, 0,
                     int64_t(padded - count_) * depth_ * sizeof(BFloat16));
    __builtin_memset(t_.totals, 0, int64_t(padded) * a.head_dim * sizeof(float));
    for (int lane = 0; lane < padded; lane += kWidth) {
      store(largest_ + lane, broadcast(kNothingSeen));
      store(total_ + lane, Vec{});
    }
    if (is_few()) turn_block(t_.queries, depth_, depth_, turned_queries());
  }

  // Chunks come in their order. `is_next`: then comes the next head's.
  void add(const Chunk& chunk, bool is_next) {
    const int64_t head_offset = int64_t(head_) * a_.head_dim;
    if (a_.kv_dtype == kFloat16)
      add((const Float16*)a_.keys + head_offset, (const Float16*)a_.values + head_offset, chunk,
          is_next);
    else
      add((const BFloat16*)a_.keys + head_offset, (const BFloat16*)a_.values + head_offset, chunk,
          is_next);
  }

  // To the result, or to a share of it that is joined with others later.
  void finish(const Unit& unit) const {
    for (int lane = 0; lane < count_; ++lane) {
      const float* sums = t_.totals + int64_t(lane) * a_.head_dim;
      const float share[] = {largest_[lane], total_[lane]};
      const int token = a_.query_starts[row_] + (begin_ + lane) / a_.group;
      if (unit.partial < 0)
        store_head(a_, token, query_head(lane), sums, total_[lane]);
      else
        store_partial(a_, unit, query_head(lane), sums, share);
    }
  }

 private:
  bool is_few() const { return count_ <= kBlockLanes; }
  // Few lanes leave room behind them.
  BFloat16* turned_queries() const { return t_.queries + kBlockLanes * depth_; }
  int query_head(int lane) const { return head_ * a_.group + (begin_ + lane) % a_.group; }

  void load_query(int token, int head, BFloat16* to) const {
    const int64_t from = token * a_.q.token_stride + head * a_.q.head_stride;
    for (int d = 0; d < depth_; d += kWidth) {
      const Vec q = d < a_.head_dim ? load_some(a_.q.data, a_.q.dtype, from + d, kWidth) : Vec{};
      store(to + d, q * a_.scale_log2e);
    }
  }

  template <class KV>
  void add(const KV* keys, const KV* values, const Chunk& chunk, bool is_next) {
    const KV* next = is_next ? keys + a_.head_dim : nullptr;
    if (!is_few()) take_in(keys, values, chunk);
    for (int lane = 0; lane < count_; lane += kBlockLanes) {
      const int last = smaller(lane + kBlockLanes, count_) - 1;
      const int begin = larger(seen_from(lane, chunk), chunk.begin);
      const int end = smaller(seen_to(last, chunk), chunk.end);
      if (begin >= end) continue;
      if (is_few())
        score_few(keys, values, chunk);
      else
        score(lane, begin, end);
      add_block(values, next, lane, last, begin, end, chunk);
    }
  }

  // What a lane sees, in keys from a chunk's first: [seen_from, seen_to).
  int seen_from(int lane, const Chunk& chunk) const {
    return larger(positions_[lane] - (a_.window - 1), 0) - chunk.first;
  }
  int seen_to(int lane, const Chunk& chunk) const { return positions_[lane] - chunk.first + 1; }

  // A block's keys as rows [16, depth]: in their page where they lie side by side.
  template <class KV>
  const BFloat16* rows_of(const KV* keys, const Chunk& chunk, int block, BFloat16* copy,
                          int64_t* stride) const {
    if (sizeof(KV) == sizeof(BFloat16) && a_.kv_dtype == kBFloat16 &&
        a_.page_size % kBlockKeys == 0 && depth_ == a_.head_dim) {
      *stride = int64_t(a_.num_kv_heads) * a_.head_dim;
      return (const BFloat16*)(keys + chunk.offsets[block]);
    }
    *stride = depth_;
    copy_keys(keys, chunk, block, a_.head_dim, copy);
    return copy;
  }

  // A chunk's keys and values as second operands, for many lanes.
  template <class KV>
  void take_in(const KV* keys, const KV* values, const Chunk& chunk) {
    for (int block = round_down(chunk.begin, kBlockKeys); block < chunk.end; block += kBlockKeys) {
      int64_t stride;
      // The sums are not in use yet.
      const BFloat16* rows = rows_of(keys, chunk, block, (BFloat16*)t_.sums, &stride);
      turn_block(rows, stride, depth_, t_.keys + int64_t(block) * depth_);
    }
    for (int key = round_down(chunk.begin, kPairedKeys); key < chunk.end; key += kPairedKeys)
      pair_values(values, chunk, key, 0, a_.head_dim, t_.values + int64_t(key) * a_.head_dim);
  }

  // Scores of one block of lanes against keys that are turned.
  void score(int lane, int begin, int end) {
    const int from = round_down(begin, kBlockKeys), to = round_up(end, kBlockKeys);
    const Tiles tiles = {t_.keys + int64_t(from) * depth_, kTileElements, kBlockKeys * depth_};
    multiply(t_.queries + int64_t(lane) * depth_, depth_ * sizeof(BFloat16), depth_, tiles,
             (to - from) / kBlockKeys, t_.scores + from, kScoresStride * sizeof(float));
  }

  // Scores of the only block of lanes against keys as they lie.
  template <class KV>
  void score_few(const KV* keys, const KV* values, const Chunk& chunk) {
    const Tiles queries = {turned_queries(), kTileElements, 0};
    for (int block = round_down(chunk.begin, kBlockKeys); block < chunk.end; block += kBlockKeys) {
      int64_t stride;
      const BFloat16* rows = rows_of(keys, chunk, block, t_.keys, &stride);
      prefetch_block(keys, values, chunk, block, a_.head_dim);
      alignas(64) float scores[kBlockKeys * kBlockLanes];
      multiply(rows, stride * sizeof(BFloat16), depth_, queries, 1, scores, 64);
      if (count_ <= 4)
        turn_few(scores, t_.scores + block);
      else
        turn(scores, 64, t_.scores + block, kScoresStride * sizeof(float));
    }
  }

  // Adds a chunk to one block of lanes, from whose scores it begins.
  template <class KV>
  void add_block(const KV* values, const KV* next, int lane, int last, int begin, int end,
                 const Chunk& chunk) {
    const int from = round_down(begin, kPairedKeys), to = round_up(end, kPairedKeys);
    alignas(64) float largest[kBlockLanes], total[kBlockLanes];
    store(largest, broadcast(kNothingSeen));
    store(total, Vec{});
    Seen seen[kBlockLanes];
    for (int i = 0; i <= last - lane; ++i) {
      seen[i] = {larger(seen_from(lane + i, chunk), begin), smaller(seen_to(lane + i, chunk), end)};
      // A window may have passed the whole chunk.
      if (seen[i].begin >= seen[i].end) seen[i] = {from, from};
      largest[i] = largest_score(t_.scores + i * kScoresStride, seen[i]);
    }
    // Nothing waits for what has only just been found.
    for (int i = 0; i <= last - lane; ++i)
      total[i] = weigh(t_.scores + i * kScoresStride, from, to, seen[i], largest[i]);
    weigh_values(values, next, from, to, chunk);
    const Joint joint = join(load(largest_ + lane), load(largest));
    store(largest_ + lane, joint.largest);
    store(total_ + lane,
          multiply_add(load(total_ + lane), joint.first, load(total) * joint.second));
    for (int i = lane; i <= last; ++i) {
      const Vec first = broadcast(joint.first[i - lane]), second = broadcast(joint.second[i - lane]);
      const float* sums = t_.sums + int64_t(i - lane) * a_.head_dim;
      add_sums(sums, first, second, t_.totals + int64_t(i) * a_.head_dim);
    }
  }

  // The weights of one block of lanes times the values, to its sums.
  template <class KV>
  void weigh_values(const KV* values, const KV* next, int from, int to, const Chunk& chunk) {
    const BFloat16* weights = (const BFloat16*)t_.scores;
    const int64_t weights_bytes = kScoresStride * sizeof(float);
    const int64_t out_bytes = a_.head_dim * sizeof(float);
    if (!is_few()) {
      const Tiles tiles = {t_.values + int64_t(from) * a_.head_dim,
                           int64_t(kPairedKeys) * a_.head_dim, kTileElements};
      return multiply(weights + from, weights_bytes, to - from, tiles, a_.head_dim / kTileOutputs,
                      t_.sums, out_bytes);
    }
    int d = 0;
    for (; d + 4 * kTileOutputs <= a_.head_dim; d += 4 * kTileOutputs)
      multiply_values<4>(weights, weights_bytes, values, next, chunk, from, to, d, t_.sums + d, out_bytes);
    // Two tiles share an order of dimensions.
    for (; d + 2 * kTileOutputs <= a_.head_dim; d += 2 * kTileOutputs)
      multiply_values<2>(weights, weights_bytes, values, next, chunk, from, to, d, t_.sums + d, out_bytes);
    if (d < a_.head_dim)
      multiply_values<1>(weights, weights_bytes, values, next, chunk, from, to, d, t_.sums + d, out_bytes);
  }

  void add_sums(const float* sums, Vec first, Vec second, float* totals) const {
    int d = 0;
    for (; d + 2 * kWidth <= a_.head_dim; d += 2 * kWidth) {
      Vec low = load(sums + d), high = load(sums + d + kWidth);
      in_order(&low, &high);
      store(totals + d, multiply_add(load(totals + d), first, low * second));
      store(totals + d + kWidth, multiply_add(load(totals + d + kWidth), first, high * second));
    }
    if (d < a_.head_dim)
      store(totals + d, multiply_add(load(totals + d), first, load(sums + d) * second));
  }

  const Attention& a_;
  const TileScratch t_;
  const int row_, head_, begin_, count_, depth_;
  int positions_[kPrefillLanes];
  alignas(64) float largest_[kPrefillLanes];
  alignas(64) float total_[kPrefillLanes];
};

void prefill_by_tiles(const Attention& a, const Unit& unit, float* scratch) {
  configure_tiles();
  Lanes lanes(a, unit.row, unit.head_begin, unit.lane_begin, unit.lane_end, scratch);
  for (int first = round_down(unit.key_begin, kChunkKeys); first < unit.key_end;
       first += kChunkKeys)
    lanes.add(Chunk(a, unit.row, first, unit.key_begin, unit.key_end), false);
  lanes.finish(unit);
}

// One token: its heads are the lanes, its keys lie in one chunk.
void decode_by_tiles(const Attention& a, const Unit& unit, float* scratch) {
  configure_tiles();
  const Chunk chunk(a, unit.row, round_down(unit.key_begin, kChunkKeys), unit.key_begin,
                    unit.key_end);
  for (int head = unit.head_begin; head < unit.head_end; ++head)
    for (int lane = 0; lane < a.group; lane += kPrefillLanes) {
      Lanes lanes(a, unit.row, head, lane, smaller(lane + kPrefillLanes, a.group), scratch);
      lanes.add(chunk, head + 1 < unit.head_end);
      lanes.finish(unit);
    }
}

}  // namespace

#endif
