// The attention of a step, split into units of work; see attention.cpp.
#pragma once

#include <map>
#include <vector>

#include "kernels.h"

namespace octavo {

// The work of a step in the layers of one window.
struct Schedule {
  std::vector<Unit> units;
  std::vector<Merge> merges;
  int32_t num_partials = 0;
  // Keys and values read: threads are used only where there are enough of them.
  int64_t elements = 0;
};

// The planes of a layer; scales are null where pages are floats.
struct LayerPages {
  DType dtype;
  void* keys;
  void* values;
  void* key_scales;
  void* value_scales;
  // See `OwnPages`; empty where pages are not encoded as a whole.
  std::vector<float> desk_keys;
  std::vector<float> desk_values;
};

// The stored indices whose keys and values are on a slot's desk, the last `desk_tokens` at most.
struct DeskTokens {
  int32_t begin;
  int32_t end;
};

struct Session;

// A layer's number in the session that has its pages.
struct Place {
  Session* session;
  int32_t layer;
};

// Attention over one pool for one model; see `CpuAttention` in model/attention/cpu.py.
struct Session {
  const Kernels* kernels;
  Attention common;
  // One for each layer.
  std::vector<LayerPages> pages;
  // One for each layer; the largest int where the layer sees all keys.
  std::vector<int32_t> windows;
  int64_t num_pages;
  // Lanes of one unit, whatever the layer.
  int32_t unit_lanes;
  std::map<int32_t, Schedule> schedules;
  std::vector<float> partials;
  // A part for each thread, aligned to cache lines: see `scratch_of`.
  std::vector<float> scratch;
  // [num_rows] each, or null where no row has a view of its own. A query at t reads the keys at s
  // if s < sinks or t - s < window; one at t >= sinks + window meets the sinks with `sink_q`, as
  // if it stood at sinks + window - 1.
  const int32_t* row_sinks = nullptr;
  const int32_t* row_windows = nullptr;
  // Where a layer's pages are encoded as a whole: the size of a slot's desk, otherwise 0.
  int32_t desk_tokens = 0;
  // [rows]
  const int32_t* row_slots = nullptr;
  // By slot.
  std::vector<DeskTokens> desks;
  // Those that the step completes, and the place of each of its tokens on the desks.
  std::vector<WholePage> whole_pages;
  std::vector<int64_t> desk_places;
  const int64_t* slots = nullptr;
  int64_t num_tokens = 0;
  int32_t num_rows = 0;
  int threads = 1;
  // Of each layer of the model, where windowed layers have a pool of their own; else empty.
  std::vector<Place> places;
};

// Runs a layer's units on the threads of the enclosing parallel region. Does not end with a barrier.
void attend(Session& session, const Attention& attention, float* scratch);

// Returns the scratch memory of one thread.
float* scratch_of(Session& session, int64_t thread);

// Returns where the pages of a layer of the model are.
Place place_of(Session& session, int32_t layer);

// Returns a layer's attention to the step's keys and values and those before, without queries and
// output.
Attention attention_of(Session& session, int32_t layer, Rows keys, Rows values);

// Returns how the step's keys (and its values) go to a layer's pages of single tokens.
Write key_write(const Session& session, int32_t layer, Rows keys);
Write value_write(const Session& session, int32_t layer, Rows values);

// ---- pages that are encoded as a whole: desks.cpp ----------------------------------------------

// Finds the pages that the step completes and the places of its tokens on the desks, which grow with
// the slots. Returns why the step cannot be run, or null.
const char* plan_desks(Session& session);

// The heads of pages that a layer encodes before its attention: how many, and those from `begin` on.
int64_t num_page_heads(const Session& session, const Attention& attention);
void encode_page_heads(const Session& session, const Attention& attention, int64_t begin,
                       int64_t end);

// Puts a row's newest keys and values on its desk, after the attention, which reads older ones.
void fill_desk(const Session& session, const Attention& attention, int32_t row);

}  // namespace octavo
