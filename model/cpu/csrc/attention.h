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

// Attention over one pool for one model; see `CpuAttention` in model/attention/cpu.py.
struct Session {
  const Kernels* kernels;
  Attention common;
  std::vector<const void*> keys, values;
  // One for each layer; the largest int where the layer sees all keys.
  std::vector<int32_t> windows;
  int64_t num_pages;
  std::map<int32_t, Schedule> schedules;
  std::vector<float> partials;
  // A part for each thread, aligned to cache lines: see `scratch_of`.
  std::vector<float> scratch;
  const int64_t* slots = nullptr;
  int64_t num_tokens = 0;
  int32_t num_rows = 0;
  int threads = 1;
};

// Runs a layer's units on the threads of the enclosing parallel region. Does not end with a barrier.
void attend(Session& session, const Attention& attention, float* scratch);

// Returns the scratch memory of one thread.
float* scratch_of(Session& session, int64_t thread);

// Returns a layer's attention, without queries and output.
Attention attention_of(const Session& session, int32_t layer);

}  // namespace octavo
