// Attention of one unit of work, by vectors or by matrix instructions.
#pragma once

#include "attention_lanes.h"
#include "attention_vector_lanes.h"

namespace {

template <class Lanes>
void add_keys(const Attention& a, int row, int begin, int end, Lanes& lanes) {
  for (int first = round_down(begin, kChunkKeys); first < end; first += kChunkKeys)
    lanes.add(Chunk(a, row, first, begin, end), false);
}

// Many tokens of one KV head.
template <class Lanes>
void prefill_lanes_of(const Attention& a, const Unit& unit, float* scratch) {
  Lanes lanes(a, unit.row, unit.head_begin, unit.lane_begin, unit.lane_end, scratch);
  if (unit.sink_begin < unit.sink_end) {
    lanes.load_queries(a.sink_q, octavo::kAllKeys);
    add_keys(a, unit.row, unit.sink_begin, unit.sink_end, lanes);
  }
  lanes.load_queries(a.q, unit.window);
  add_keys(a, unit.row, unit.key_begin, unit.key_end, lanes);
  lanes.finish(unit);
}

// One token: its heads are the lanes, and its keys are in one chunk.
template <class Lanes>
void decode_lanes_of(const Attention& a, const Unit& unit, float* scratch) {
  const bool are_sinks = unit.sink_begin < unit.sink_end;
  const int begin = are_sinks ? unit.sink_begin : unit.key_begin;
  const Chunk chunk(a, unit.row, round_down(begin, kChunkKeys), begin,
                    are_sinks ? unit.sink_end : unit.key_end);
  for (int head = unit.head_begin; head < unit.head_end; ++head)
    for (int lane = 0; lane < a.group; lane += Lanes::kMost) {
      Lanes lanes(a, unit.row, head, lane, smaller(lane + Lanes::kMost, a.group), scratch);
      lanes.load_queries(are_sinks ? a.sink_q : a.q, unit.window);
      lanes.add(chunk, head + 1 < unit.head_end);
      lanes.finish(unit);
    }
}

template <class Lanes>
void attend_lanes(const Attention& a, const Unit& unit, float* scratch) {
  (unit.lane_end ? prefill_lanes_of<Lanes> : decode_lanes_of<Lanes>)(a, unit, scratch);
}

// Pages in float32 are meant to be exact: bfloat16 operands would round them. Whole pages are read by
// vectors alone.
inline bool is_by_tiles([[maybe_unused]] DType kv_dtype) {
#if defined(__AMX_BF16__)
  return kv_dtype != kFloat32 && !is_by_page(kv_dtype);
#else
  return false;
#endif
}

void attend_unit(const Attention& a, const Unit& unit, float* scratch) {
#if defined(__AMX_BF16__)
  if (is_by_tiles(a.kv_dtype)) {
    configure_tiles();
    return attend_lanes<Lanes>(a, unit, scratch);
  }
#endif
  switch (a.kv_dtype) {
    case kFloat16: return attend_lanes<VectorLanes<Float16>>(a, unit, scratch);
    case kBFloat16: return attend_lanes<VectorLanes<BFloat16>>(a, unit, scratch);
    case kFloat8: return attend_lanes<VectorLanes<Float8>>(a, unit, scratch);
    // Rows of four bits are unpacked to bytes.
    case kInt8:
    case kInt4: return attend_lanes<VectorLanes<int8_t>>(a, unit, scratch);
    case kKivi4:
    case kKivi2: return attend_lanes<VectorLanes<WholePages>>(a, unit, scratch);
    default: return attend_lanes<VectorLanes<float>>(a, unit, scratch);
  }
}

int32_t unit_lanes(DType kv_dtype) {
  return is_by_tiles(kv_dtype) ? octavo::kTileLanes : octavo::kVectorLanes;
}

int64_t scratch_floats(int head_dim) {
  const int64_t floats = VectorScratch::floats(head_dim);
#if defined(__AMX_BF16__)
  if (TileScratch::floats(head_dim) > floats) return TileScratch::floats(head_dim);
#endif
  return floats;
}

}  // namespace
