// Prefill: many query tokens a row; an online softmax over tiles of keys (arXiv:2205.14135).
//
// Queries and sums are transposed, with (token, head) pairs as the lanes of a vector. So the softmax
// works lane by lane, and both products broadcast one float of a key or value against vectors of
// lanes: pages are read in place.
#pragma once

#include "attention_decode.h"
#include "attention_lanes.h"
#include "simd.h"

namespace {

using octavo::kPrefillKeys;
using octavo::kPrefillLanes;

struct PrefillScratch {
  // [head_dim, lanes], [head_dim, lanes], [keys, lanes].
  float* queries;
  float* sums;
  float* scores;
  // [keys, head_dim] each: converted keys and values.
  float* keys;
  float* values;

  PrefillScratch(float* at, int head_dim)
      : queries(at),
        sums(queries + int64_t(head_dim) * kPrefillLanes),
        scores(sums + int64_t(head_dim) * kPrefillLanes),
        keys(scores + kPrefillKeys * kPrefillLanes),
        values(keys + int64_t(kPrefillKeys) * head_dim) {}

  static int64_t floats(int head_dim) {
    return 2 * int64_t(head_dim) * (kPrefillLanes + kPrefillKeys) + kPrefillKeys * kPrefillLanes;
  }
};

// Running softmax of each lane.
struct LaneStats {
  alignas(64) float largest[kPrefillLanes];
  alignas(64) float total[kPrefillLanes];
  // The factor of the sums so far.
  alignas(64) float rescale[kPrefillLanes];
  // Last key each lane sees.
  alignas(64) float last_key[kPrefillLanes];
};

// scores[key][lane] = Σ_d keys[key][d] * queries[d][lane] for Keys keys and Vectors vectors.
template <int Keys, int Vectors>
inline void dot_lanes(const float* const* keys, const float* queries, int head_dim, float* scores) {
  Vec dots[Keys][Vectors] = {};
  const float* rows[Keys];
  for (int i = 0; i < Keys; ++i) rows[i] = keys[i];
  for (int d = 0; d < head_dim; ++d) {
    Vec q[Vectors];
#pragma GCC unroll 8
    for (int j = 0; j < Vectors; ++j) q[j] = load(queries + d * kPrefillLanes + j * kWidth);
#pragma GCC unroll 8
    for (int i = 0; i < Keys; ++i) {
      const Vec k = broadcast(rows[i][d]);
#pragma GCC unroll 8
      for (int j = 0; j < Vectors; ++j) dots[i][j] += k * q[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < Keys; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < Vectors; ++j) store(scores + i * kPrefillLanes + j * kWidth, dots[i][j]);
}

// sums[d][lane] = sums[d][lane] * rescale[lane] + Σ_key values[key][d] * weights[key][lane].
template <int Dims, int Vectors>
inline void add_lanes(const float* const* values, int at, const float* weights, int num_keys,
                      const float* rescale, float* sums) {
  Vec total[Dims][Vectors];
#pragma GCC unroll 8
  for (int i = 0; i < Dims; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < Vectors; ++j)
      total[i][j] = load(sums + i * kPrefillLanes + j * kWidth) * load(rescale + j * kWidth);
  for (int key = 0; key < num_keys; ++key) {
    const float* row = values[key] + at;
    Vec w[Vectors];
#pragma GCC unroll 8
    for (int j = 0; j < Vectors; ++j) w[j] = load(weights + key * kPrefillLanes + j * kWidth);
#pragma GCC unroll 8
    for (int i = 0; i < Dims; ++i) {
      const Vec v = broadcast(row[i]);
#pragma GCC unroll 8
      for (int j = 0; j < Vectors; ++j) total[i][j] += v * w[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < Dims; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < Vectors; ++j) store(sums + i * kPrefillLanes + j * kWidth, total[i][j]);
}

// Replaces the scores of one tile by weights; a key that a lane does not see gets zero.
inline void softmax_lanes(float* scores, int first_key, int num_keys, int lane, float window,
                        bool masked, LaneStats& stats) {
  const Vec last_key = load(stats.last_key + lane), before = load(stats.largest + lane);
  Vec largest = before;
  for (int key = 0; key < num_keys; ++key) {
    float* at = scores + key * kPrefillLanes + lane;
    Vec score = load(at);
    if (masked) {
      const Vec back = last_key - float(first_key + key);
      score = (back >= 0.0f) & (back < window) ? score : broadcast(-__builtin_inff());
      store(at, score);
    }
    largest = max(largest, score);
  }
  Vec total = {};
  for (int key = 0; key < num_keys; ++key) {
    float* at = scores + key * kPrefillLanes + lane;
    const Vec weight = exp2(load(at) - largest);
    store(at, weight);
    total += weight;
  }
  const Vec rescale = exp2(before - largest);
  store(stats.largest + lane, largest);
  store(stats.rescale + lane, rescale);
  store(stats.total + lane, load(stats.total + lane) * rescale + total);
}

// One tile of keys for `Vectors` vectors of lanes from `lane` on.
template <int Vectors>
void attend_tile(const PrefillScratch& s, const float* const* keys, const float* const* values,
                 int first_key, int num_keys, int lane, int head_dim, float window, bool masked,
                 LaneStats& stats) {
  // Eight independent sums at least, to cover the latency of a multiply-add.
  constexpr int kRows = Vectors == 1 ? 8 : 4;
  for (int key = 0; key < num_keys; key += kRows)
    dot_lanes<kRows, Vectors>(keys + key, s.queries + lane, head_dim,
                              s.scores + key * kPrefillLanes + lane);
  for (int j = 0; j < Vectors; ++j)
    softmax_lanes(s.scores, first_key, num_keys, lane + j * kWidth, window, masked, stats);
  for (int d = 0; d < head_dim; d += kRows)
    add_lanes<kRows, Vectors>(values, d, s.scores + lane, num_keys, stats.rescale + lane,
                              s.sums + d * kPrefillLanes + lane);
}

// Sets pointers to a tile's rows as floats: into the pages, or into `converted`.
inline void load_rows(const void* pages, DType dtype, const int64_t* offsets, int num_keys,
                      int64_t head_offset, int head_dim, float* converted, const float** rows) {
  for (int key = 0; key < num_keys; ++key) {
    const int64_t from = offsets[key] + head_offset;
    if (dtype == kFloat32) {
      rows[key] = (const float*)pages + from;
      continue;
    }
    float* to = converted + int64_t(key) * head_dim;
    for (int d = 0; d < head_dim; d += kWidth)
      store(to + d, load_some(pages, dtype, from + d, kWidth));
    rows[key] = to;
  }
  // The kernels process eight rows at a time; the results of these are not used.
  for (int key = num_keys; key < (num_keys + 7) / 8 * 8; ++key) rows[key] = rows[num_keys - 1];
}

// Loads the queries. Lanes past the unit's last repeat it, and are not stored.
inline void load_lanes(const Attention& a, const Unit& unit, int num_lanes, PrefillScratch& s,
                       LaneStats& stats) {
  const int first_token = a.query_starts[unit.row];
  const int num_tokens = a.query_starts[unit.row + 1] - first_token;
  const int first_index = a.seq_lens[unit.row] - num_tokens;
  alignas(64) float query[octavo::kMaxHeadDim];
  for (int lane = 0; lane < num_lanes; ++lane) {
    const int pair = smaller(unit.lane_begin + lane, unit.lane_end - 1);
    const int token = pair / a.group, head = unit.head_begin * a.group + pair % a.group;
    const int64_t from = (first_token + token) * a.q.token_stride + head * a.q.head_stride;
    for (int d = 0; d < a.head_dim; d += kWidth)
      store(query + d, load_some(a.q.data, a.q.dtype, from + d, kWidth) * a.scale_log2e);
    for (int d = 0; d < a.head_dim; ++d) s.queries[d * kPrefillLanes + lane] = query[d];
    stats.last_key[lane] = float(first_index + token);
  }
  for (int lane = 0; lane < num_lanes; lane += kWidth) {
    store(stats.largest + lane, broadcast(kNothingSeen));
    store(stats.total + lane, Vec{});
    for (int d = 0; d < a.head_dim; ++d) store(s.sums + d * kPrefillLanes + lane, Vec{});
  }
}

inline void store_lanes(const Attention& a, const Unit& unit, const float* lanes,
                        const LaneStats& stats) {
  const int first_token = a.query_starts[unit.row];
  alignas(64) float sums[octavo::kMaxHeadDim];
  for (int pair = unit.lane_begin; pair < unit.lane_end; ++pair) {
    const int lane = pair - unit.lane_begin;
    const int head = unit.head_begin * a.group + pair % a.group;
    for (int d = 0; d < a.head_dim; ++d) sums[d] = lanes[d * kPrefillLanes + lane];
    store_head(a, first_token + pair / a.group, head, sums, stats.total[lane]);
  }
}

// Returns whether some lane does not see the whole tile: it has keys after the first token, or
// before the window of the last one.
inline bool is_masked(const Attention& a, const Unit& unit, const LaneStats& stats, int key,
                      int last_key) {
  const float newest = stats.last_key[unit.lane_end - unit.lane_begin - 1];
  return last_key > stats.last_key[0] || newest - key >= float(a.window);
}

void attend_by_vectors(const Attention& a, const Unit& unit, float* scratch) {
  PrefillScratch s(scratch, a.head_dim);
  LaneStats stats;
  const int num_vectors = (unit.lane_end - unit.lane_begin + kWidth - 1) / kWidth;
  load_lanes(a, unit, num_vectors * kWidth, s, stats);
  const int64_t head_offset = int64_t(unit.head_begin) * a.head_dim;
  int64_t offsets[kPrefillKeys];
  const float* keys[kPrefillKeys];
  const float* values[kPrefillKeys];
  const float window = float(a.window);
  for (int key = unit.key_begin; key < unit.key_end; key += kPrefillKeys) {
    const int num_keys = smaller(kPrefillKeys, unit.key_end - key);
    locate_keys(a, unit.row, key, key + num_keys, offsets);
    load_rows(a.keys, a.kv_dtype, offsets, num_keys, head_offset, a.head_dim, s.keys, keys);
    load_rows(a.values, a.kv_dtype, offsets, num_keys, head_offset, a.head_dim, s.values, values);
    const bool masked = is_masked(a, unit, stats, key, key + num_keys - 1);
    int done = 0;
    for (; done + 4 <= num_vectors && kWidth == 16; done += 4)
      attend_tile<4>(s, keys, values, key, num_keys, done * kWidth, a.head_dim, window, masked,
                     stats);
    for (; done + 2 <= num_vectors; done += 2)
      attend_tile<2>(s, keys, values, key, num_keys, done * kWidth, a.head_dim, window, masked,
                     stats);
    for (; done < num_vectors; ++done)
      attend_tile<1>(s, keys, values, key, num_keys, done * kWidth, a.head_dim, window, masked,
                     stats);
  }
  store_lanes(a, unit, s.sums, stats);
}

// Pages in float32 are meant to be exact: bfloat16 operands would round them.
inline bool is_by_tiles(DType kv_dtype) {
#if defined(__AMX_BF16__)
  return kv_dtype != kFloat32;
#else
  return false;
#endif
}

void prefill(const Attention& a, const Unit& unit, float* scratch) {
#if defined(__AMX_BF16__)
  if (is_by_tiles(a.kv_dtype)) return prefill_by_tiles(a, unit, scratch);
#endif
  attend_by_vectors(a, unit, scratch);
}

void decode(const Attention& a, const Unit& unit, float* scratch) {
#if defined(__AMX_BF16__)
  if (is_by_tiles(a.kv_dtype)) return decode_by_tiles(a, unit, scratch);
#endif
  decode_by_vectors(a, unit, scratch);
}

int32_t prefill_lanes(DType kv_dtype) {
  return is_by_tiles(kv_dtype) ? octavo::kTileLanes : kPrefillLanes;
}

int64_t scratch_floats(int head_dim) {
  const int64_t floats = PrefillScratch::floats(head_dim);
#if defined(__AMX_BF16__)
  if (TileScratch::floats(head_dim) > floats) return TileScratch::floats(head_dim);
#endif
  return floats;
}

}  // namespace
