// Attention by matrix instructions, for keys and values of 16 bits and codes: the layout of operands, and
// their products. Operands are bfloat16, sums are float32; attention_lanes.h has the softmax.
//
// A second operand interleaves pairs along the dimension of the sum. For values a pair is two keys'
// rows. For keys it is two dimensions of a row, which needs a transposition: worth it for many lanes.
// For few lanes the queries are transposed instead, keys are a first operand without a copy, and the
// scores are transposed back: the same sums in the same order.
#pragma once

#include "attention_codes.h"
#include "products.h"

#if defined(__AMX_BF16__)

namespace {

using octavo::kTileLanes;

static_assert(kBlockLanes == kTileOutputs && kBlockKeys == kTileOutputs);
constexpr int kPairedKeys = kTileInputs;
// Up to so many lanes, only their scores are transposed.
constexpr int kFewLanes = 4;
// Prefetch distance, in blocks of keys.
constexpr int kBlocksAhead = 4;

struct TileScratch {
  // [lanes, depth]; for few lanes tiles of the second operand.
  BFloat16* queries;
  // [keys, depth], or tiles of the second operand [blocks of keys, tiles of depth].
  BFloat16* keys;
  // Tiles of the second operand [pairs of blocks of keys, blocks of dimensions].
  BFloat16* values;
  // [keys, head_dim] each: codes of a byte, unpacked from fewer bits.
  int8_t* key_codes;
  int8_t* value_codes;
  // [lanes of a block, kScoresStride]: scores, then weights as bfloat16 in the same place.
  float* scores;
  // [lanes of a block, head_dim]: of one chunk.
  float* sums;
  // [lanes, head_dim]: of the chunks before.
  float* totals;

  static int depth(int head_dim) { return round_up(head_dim, kTileInputs); }

  TileScratch(float* at, int head_dim)
      : queries((BFloat16*)at),
        keys(queries + kTileLanes * depth(head_dim)),
        values(keys + kChunkKeys * depth(head_dim)),
        key_codes((int8_t*)(values + kChunkKeys * head_dim)),
        value_codes(key_codes + kChunkKeys * head_dim),
        scores((float*)(value_codes + kChunkKeys * head_dim)),
        sums(scores + kBlockLanes * kScoresStride),
        totals(sums + kBlockLanes * head_dim) {}

  static int64_t floats(int head_dim) {
    return (int64_t(kTileLanes + kChunkKeys) * depth(head_dim) + 2 * kChunkKeys * head_dim) / 2 +
           kBlockLanes * kScoresStride + int64_t(kBlockLanes + kTileLanes) * head_dim;
  }
};

// ---- the layout of operands --------------------------------------------------------------------

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
inline void transpose_words(const void* from, int64_t from_bytes, void* to, int64_t to_bytes) {
  __m512i rows[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) rows[i] = _mm512_loadu_si512((const char*)from + i * from_bytes);
  transpose(rows);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) _mm512_storeu_si512((char*)to + i * to_bytes, rows[i]);
}

// Rows of one block, [16, depth], as tiles of the second operand.
inline void transpose_block(const BFloat16* rows, int64_t stride, int depth, BFloat16* tiles) {
  for (int d = 0; d < depth; d += kTileInputs, tiles += kTileElements)
    transpose_words(rows + d, stride * sizeof(BFloat16), tiles, 64);
}

// Scores [16 keys, 16 lanes] to [lanes, kScoresStride], the first four lanes' alone.
inline void transpose_few(const float* scores, float* to) {
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

inline __m512i load_32(const BFloat16* from) { return _mm512_loadu_si512(from); }
template <class KV>
inline __m512i load_32(const KV* from) {
  const Vec first = load(from), second = load(from + kWidth);
  return (__m512i)_mm512_cvtne2ps_pbh(bit_cast<__m512>(second), bit_cast<__m512>(first));
}

// Prefetches a block of rows ahead of `key`; past the end of the chunk, of the rows read `next`.
// Always inlined: GCC 12 drops calls of a function that does nothing but prefetch.
template <class KV>
__attribute__((always_inline)) inline void prefetch_block(const KV* pages, const KV* next,
                                                          const Chunk& chunk, int key,
                                                          int head_dim) {
  const int begin = round_down(chunk.begin, kBlockKeys), end = chunk.end;
  int ahead = key + kBlocksAhead * kBlockKeys;
  if (ahead >= end) ahead += begin - round_up(end, kBlockKeys), pages = next;
  if (!pages || ahead >= end) return;
  const int last = smaller(ahead + kBlockKeys, end);
  for (; ahead < last; ++ahead) prefetch(pages + chunk.offsets[ahead], head_dim);
}

// Interleaves two rows of floats as pairs of bfloat16.
inline __m512i pairs_of(Vec even, Vec odd) {
  const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(bit_cast<__m512>(even)));
  const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(bit_cast<__m512>(odd)));
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

// Returns zeros for a key outside the view, since its memory may hold NaN.
template <class KV>
inline const KV* row_or_zeros(const KV* pages, const Chunk& chunk, int key) {
  alignas(64) static const KV zeros[octavo::kMaxHeadDim] = {};
  return key >= chunk.begin && key < chunk.end ? pages + chunk.offsets[key] : zeros;
}

// One block of keys to [16, depth].
template <class KV>
inline void copy_keys(const KV* pages, const Chunk& chunk, int block, int head_dim, BFloat16* to) {
  for (int key = block; key < block + kBlockKeys; ++key) {
    const KV* row = row_or_zeros(pages, chunk, key);
    int d = 0;
    for (; d + kTileInputs <= head_dim; d += kTileInputs, to += kTileInputs)
      _mm512_storeu_si512(to, load_32(row + d));
    if (d < head_dim) store(to, load(row + d), Vec{}), to += kTileInputs;
  }
}

// Tiles of the values of 32 keys, `count` dimensions from the row's `d` on. Two rows interleave
// within the quarters of a vector, which is one instruction and leaves 32 dimensions in an order of
// their own: `restore_order` undoes it in the sums.
template <class KV>
inline void pair_values(const KV* pages, const Chunk& chunk, int keys, int d, int count,
                        BFloat16* to) {
  for (int key = keys; key < keys + kPairedKeys; key += 2, to += kTileInputs) {
    const KV* even = row_or_zeros(pages, chunk, key) + d;
    const KV* odd = row_or_zeros(pages, chunk, key + 1) + d;
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

// Restores the order of the sums of 32 dimensions, which `pair_values` changed.
inline void restore_order(Vec* low, Vec* high) {
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

}  // namespace

#endif
