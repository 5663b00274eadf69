// What all kinds of attention share: the keys of a chunk, and softmaxes of parts joined to one.
//
// Lanes are the (token, head) pairs of one KV head. A chunk of 256 keys, counted from the sequence's
// first, is one plain softmax for each lane; chunks are joined in their order. A lane's sums run
// along its own row in a fixed order, so its result is the same to the bit whatever the lanes beside
// it: computed alone, in a prompt, or in any piece of one.
#pragma once

#include "hadamard.h"

namespace {

using octavo::Attention;
using octavo::Unit;
using octavo::kChunkKeys;

constexpr int kBlockLanes = 16;
constexpr int kBlockKeys = 16;
// Keys that all lanes of a block meet while they are in the nearest cache.
constexpr int kTileKeys = 32;
// Prefetch distance in keys. The rows of one head are not adjacent, and the CPU's own prefetcher
// reaches two thirds of the bandwidth that this reaches.
constexpr int kKeysAhead = 16;
// Floats from a lane's scores to the next lane's: a cache line more than the scores need, so that
// the lanes do not all map to the same sets of the cache.
constexpr int kScoresStride = kChunkKeys + 16;

// The largest score of no key: finite, so that the difference of two of them is not NaN.
constexpr float kNothingSeen = -1e30f;

inline int round_down(int value, int multiple) { return value / multiple * multiple; }
inline int round_up(int value, int multiple) { return round_down(value + multiple - 1, multiple); }

// Inlined, since the compiler removes calls that have no result.
template <class T>
__attribute__((always_inline)) inline void prefetch(const T* from, int count) {
  for (int i = 0; i < count; i += 64 / int(sizeof(T))) __builtin_prefetch(from + i);
}

// Offsets of the keys [begin, end), from the layer's first; `elements` are those of a key and head.
inline void locate_keys(const Attention& a, int row, int begin, int end, int64_t elements,
                        int64_t* offsets) {
  const int32_t* table = a.block_table + row * a.table_stride;
  const int64_t token_elements = a.num_kv_heads * elements;
  int page = begin / a.page_size, at = begin % a.page_size;
  for (int key = begin; key < end; ++key) {
    *offsets++ = (int64_t(table[page]) * a.page_size + at) * token_elements;
    if (++at == a.page_size) ++page, at = 0;
  }
}

// The keys of a chunk that some lane sees, counted from the chunk's first, and their offsets.
struct Chunk {
  int first;
  int begin;
  int end;
  // In elements (kInt4: bytes), of whole blocks of keys; rows before `begin` and from `end` on may
  // hold anything.
  int64_t offsets[kChunkKeys];
  // Of codes: in vectors of a key and head, as scales are counted.
  int64_t vectors[kChunkKeys];

  Chunk(const Attention& a, int row, int chunk_first, int key_begin, int key_end)
      : first(chunk_first),
        begin(larger(key_begin - first, 0)),
        end(smaller(key_end - first, kChunkKeys)) {
    const int from = round_down(begin, kBlockKeys);
    const int elements = a.kv_dtype == kInt4 ? a.head_dim / 2 : a.head_dim;
    locate_keys(a, row, first + from, first + end, elements, offsets + from);
    if (is_coded(a.kv_dtype)) locate_keys(a, row, first + from, first + end, 1, vectors + from);
  }
};

// A vector of a query that enters products, `d` elements behind its first at `from`: with the factor of
// a softmax in powers of two. Zeros behind the head.
inline Vec query_part(const Attention& a, const octavo::Rows& rows, int64_t from, int d) {
  const Vec q = d < a.head_dim ? load_some(rows.data, rows.dtype, from + d, kWidth) : Vec{};
  return q * a.scale_log2e;
}

// The keys of a chunk that one lane sees, counted from the chunk's first.
struct Seen {
  int begin;
  int end;
};

// ---- softmax -----------------------------------------------------------------------------------

// A number up to 0 as the nearest integer, in the low bits of `shifted`, and a rest.
struct Exponent {
  Vec x;
  Vec shifted;
  Vec rest;

  explicit Exponent(Vec x_) : x(x_), shifted(x + 12582912.0f), rest(x - (shifted - 12582912.0f)) {}

  // Returns 2 to the power of x from that of the rest; zero below -126. NaN stays NaN.
  Vec scale(Vec power) const {
    const IntVec scaled = bit_cast<IntVec>(power) + (bit_cast<IntVec>(shifted) << 23);
    return bit_cast<Vec>(scaled & ~(x < -126.0f));
  }
};

// 2 to the power of x, for x up to 0, with a relative error of 1e-4: the rounding to bfloat16 that
// follows is twenty times as coarse.
inline Vec exp2_coarse(Vec x) {
  const Exponent e(x);
  Vec p = broadcast(5.500893112e-2f);
  p = p * e.rest + 2.422109593e-1f;
  p = p * e.rest + 6.932829271e-1f;
  return e.scale(p * e.rest + 1.0f);
}

// The same with the error of `exp2`.
inline Vec exp2_fine(Vec x) {
  const Exponent e(x);
  return e.scale(exp2_of_rest(e.rest));
}

// Sets the scores of keys outside the view to minus infinity.
inline void hide(float* scores, int key, Seen seen) {
  for (int at = key; at < key + kWidth; ++at)
    if (at < seen.begin || at >= seen.end) scores[at] = -__builtin_inff();
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

// One lane's softmax over some keys, but for its sum of weighted values.
struct Share {
  float largest;
  float total;
};

// Joins the next chunk's softmax to that of the chunks before.
inline void add_part(Share& share, float* totals, Share part, const float* sums, int head_dim) {
  const Joint joint = join(broadcast(share.largest), broadcast(part.largest));
  const Vec total =
      multiply_add(broadcast(share.total), joint.first, broadcast(part.total) * joint.second);
  share = {joint.largest[0], total[0]};
  for (int d = 0; d < head_dim; d += kWidth)
    store(totals + d, multiply_add(load(totals + d), joint.first, load(sums + d) * joint.second));
}

// ---- results -----------------------------------------------------------------------------------

inline void store_head(const Attention& a, int token, int head, const float* sums, float total) {
  const int64_t to = token * a.out.token_stride + head * a.out.head_stride;
  alignas(64) float turned_back[octavo::kMaxHeadDim];
  if (is_rotated(a.kv_dtype)) {
    __builtin_memcpy(turned_back, sums, a.head_dim * sizeof(float));
    hadamard(turned_back, a.head_dim);
    sums = turned_back;
  }
  for (int d = 0; d < a.head_dim; d += kWidth)
    store_some(a.out.data, a.out.dtype, to + d, load(sums + d) / total, kWidth);
}

inline void store_partial(const Attention& a, const Unit& unit, int head, const float* sums,
                          Share share) {
  const int64_t heads = int64_t(a.num_kv_heads) * a.group;
  float* to = a.partials + (unit.partial * heads + head) * (a.head_dim + 2);
  for (int d = 0; d < a.head_dim; d += kWidth) store(to + d, load(sums + d));
  to[a.head_dim] = share.largest;
  to[a.head_dim + 1] = share.total;
}

// Joins the partial softmaxes of one row, in their order.
void merge(const Attention& a, const octavo::Merge& m) {
  const int heads = a.num_kv_heads * a.group, dim = a.head_dim;
  const int64_t stride = int64_t(heads) * (dim + 2);
  alignas(64) float sums[octavo::kMaxHeadDim];
  for (int head = 0; head < heads; ++head) {
    const float* part = a.partials + m.first_partial * stride + head * (dim + 2);
    Share share = {kNothingSeen, 0.0f};
    for (int d = 0; d < dim; ++d) sums[d] = 0.0f;
    for (int i = 0; i < m.num_partials; ++i, part += stride)
      add_part(share, sums, {part[dim], part[dim + 1]}, part, dim);
    store_head(a, a.query_starts[m.row], head, sums, share.total);
  }
}

}  // namespace
