// A step's attention, cut into units of work; see attention.cpp.
#pragma once

#include <map>
#include <vector>

#include "kernels.h"

namespace octavo {

// The work of a step in layers of one window.
struct Schedule {
  std::vector<Unit> units;
  std::vector<Merge> merges;
  int32_t num_partials = 0;
  // Keys and values read, for weighing whether threads are worth waking.
  int64_t elements = 0;
};

// Attention over one pool for one model; see `CpuAttention` in model/attention/cpu.py.
struct Session {
  const Kernels* kernels;
  Attention common;
  std::vector<const void*> keys, values;
  // One for each layer; the largest int where the layer sees everything.
  std::vector<int32_t> windows;
  int64_t num_pages;
  std::map<int32_t, Schedule> schedules;
  std::vector<float> partials;
  // One piece a thread, on boundaries of cache lines: see `scratch_of`.
  std::vector<float> scratch;
  const int64_t* slots = nullptr;
  int64_t num_tokens = 0;
  int32_t num_rows = 0;
  int threads = 1;
};

// Lets the threads of the region around it work through a layer's units. Ends with no barrier.
void attend(Session& session, const Attention& attention, float* scratch);

// The scratch memory of one thread.
float* scratch_of(Session& session, int64_t thread);

// A layer's attention, still without its rows.
Attention attention_of(const Session& session, int32_t layer);

}  // namespace octavo
