// Attention over pages: splits a step into units of work and distributes them among the threads.
//
// Knows nothing of instruction sets: the arithmetic is behind `Kernels`.

#include "attention.h"

#include <cstring>
#include <limits>
#include <memory>

#include "threads.h"

namespace octavo {
namespace {

constexpr int64_t kLineFloats = 16;

int64_t scratch_floats(const Session& s) {
  const int64_t floats = s.kernels->scratch_floats(s.common.head_dim);
  return (floats + kLineFloats - 1) / kLineFloats * kLineFloats;
}

int64_t num_keys(const Unit& unit) {
  return int64_t(unit.key_end - unit.key_begin) + (unit.sink_end - unit.sink_begin);
}

int64_t cost(const Unit& unit) {
  // A decode unit is bound by memory, a prefill unit by arithmetic, which costs less for each key.
  const int64_t lanes = unit.lane_end - unit.lane_begin;
  return num_keys(unit) * (lanes ? lanes : 4 * (unit.head_end - unit.head_begin));
}

// The keys [begin, end) of a row.
struct Keys {
  int32_t begin;
  int32_t end;
  int32_t num_chunks() const {
    return begin < end ? (end - 1) / kChunkKeys - begin / kChunkKeys + 1 : 0;
  }
};

// What some tokens of a row see in the layers of one window.
struct Sight {
  int32_t window;
  Keys sinks;
};

// Tokens before this index see what the model's own view shows, those from it on less.
int64_t first_bounded(const Session& s, int32_t row) {
  return s.row_windows ? int64_t(s.row_sinks[row]) + s.row_windows[row]
                       : std::numeric_limits<int64_t>::max();
}

// What the tokens from `first_bounded` on see. The layer's window counts from the position that they
// have towards the sinks.
Sight bounded_sight(const Session& s, int32_t row, int32_t layer_window) {
  const int32_t sinks = s.row_sinks[row];
  const int64_t oldest = std::max(first_bounded(s, row) - layer_window, int64_t(0));
  return {std::min(layer_window, s.row_windows[row]),
          {int32_t(std::min(oldest, int64_t(sinks))), sinks}};
}

void add_decode_units(const Session& s, int32_t row, Keys keys, bool are_sinks, int32_t heads_each,
                      int32_t first_partial, Schedule& schedule) {
  const int32_t first = keys.begin / kChunkKeys;
  for (int32_t chunk = first; chunk < first + keys.num_chunks(); ++chunk)
    for (int32_t head = 0; head < s.common.num_kv_heads; head += heads_each) {
      Unit unit = {};
      unit.row = row;
      unit.head_begin = head;
      unit.head_end = std::min(head + heads_each, s.common.num_kv_heads);
      (are_sinks ? unit.sink_begin : unit.key_begin) = std::max(keys.begin, chunk * kChunkKeys);
      (are_sinks ? unit.sink_end : unit.key_end) = std::min(keys.end, (chunk + 1) * kChunkKeys);
      unit.window = kAllKeys;
      unit.partial = first_partial < 0 ? -1 : first_partial + chunk - first;
      schedule.units.push_back(unit);
    }
}

void add_decode(const Session& s, int32_t row, const Sight& sight, int32_t heads_each,
                Schedule& schedule) {
  const int32_t end = s.common.seq_lens[row];
  const Keys keys = {end > sight.window ? end - sight.window : 0, end};
  const int32_t num_sink_partials = sight.sinks.num_chunks();
  const int32_t num_partials = num_sink_partials + keys.num_chunks();
  const int32_t first = num_partials == 1 ? -1 : schedule.num_partials;
  add_decode_units(s, row, sight.sinks, true, heads_each, first, schedule);
  add_decode_units(s, row, keys, false, heads_each, first < 0 ? -1 : first + num_sink_partials,
                   schedule);
  if (num_partials == 1) return;
  schedule.merges.push_back({row, schedule.num_partials, num_partials});
  schedule.num_partials += num_partials;
}

// The tokens [token_begin, token_end) of a row, counted from its first of the step.
void add_prefill(const Session& s, int32_t row, int32_t token_begin, int32_t token_end,
                 const Sight& sight, Schedule& schedule) {
  const int32_t num_tokens = s.common.query_starts[row + 1] - s.common.query_starts[row];
  const int32_t first_index = s.common.seq_lens[row] - num_tokens;
  const int32_t num_lanes = token_end * s.common.group;
  // The first lane behind the page of the token that a lane belongs to: keys of its own page have
  // another form than those before.
  const auto page_end = [&](int32_t lane) {
    if (!s.desk_tokens) return num_lanes;
    const int32_t size = s.common.page_size, index = first_index + lane / s.common.group;
    return ((index / size + 1) * size - first_index) * s.common.group;
  };
  for (int32_t head = 0; head < s.common.num_kv_heads; ++head)
    for (int32_t lane = token_begin * s.common.group, end; lane < num_lanes; lane = end) {
      end = std::min({lane + s.unit_lanes, num_lanes, page_end(lane)});
      Unit unit = {};
      unit.row = row;
      unit.head_begin = head;
      unit.head_end = head + 1;
      unit.lane_begin = lane;
      unit.lane_end = end;
      const int32_t oldest = first_index + lane / s.common.group;
      unit.key_begin = oldest >= sight.window ? oldest - sight.window + 1 : 0;
      unit.key_end = first_index + (unit.lane_end - 1) / s.common.group + 1;
      unit.partial = -1;
      unit.window = sight.window;
      unit.sink_begin = sight.sinks.begin;
      unit.sink_end = sight.sinks.end;
      schedule.units.push_back(unit);
    }
}

void add_row(const Session& s, int32_t row, int32_t window, int32_t heads_each,
             Schedule& schedule) {
  const int32_t num_tokens = s.common.query_starts[row + 1] - s.common.query_starts[row];
  const Sight whole = {window, {0, 0}};
  const int64_t bounded = first_bounded(s, row) - (s.common.seq_lens[row] - num_tokens);
  const auto num_whole = int32_t(std::min(std::max(bounded, int64_t(0)), int64_t(num_tokens)));
  if (num_tokens == 1)
    return add_decode(s, row, num_whole ? whole : bounded_sight(s, row, window), heads_each,
                      schedule);
  if (num_whole) add_prefill(s, row, 0, num_whole, whole, schedule);
  if (num_whole < num_tokens)
    add_prefill(s, row, num_whole, num_tokens, bounded_sight(s, row, window), schedule);
}

void fill(const Session& s, int32_t window, Schedule& schedule) {
  schedule.units.clear();
  schedule.merges.clear();
  schedule.num_partials = 0;
  const Attention& a = s.common;
  int64_t num_chunks = 0;
  for (int32_t row = 0; row < s.num_rows; ++row)
    num_chunks += (std::min(a.seq_lens[row], window) + kChunkKeys - 1) / kChunkKeys;
  // One unit for all heads reads memory sequentially; too few units leave threads idle.
  const int32_t heads_each = num_chunks >= 4 * s.threads ? a.num_kv_heads : 1;
  for (int32_t row = 0; row < s.num_rows; ++row)
    if (a.query_starts[row + 1] > a.query_starts[row]) add_row(s, row, window, heads_each, schedule);
  schedule.elements = 0;
  for (const Unit& unit : schedule.units)
    schedule.elements += num_keys(unit) * a.head_dim * 2 * (unit.head_end - unit.head_begin) *
                         (unit.lane_end ? 4 : 1);
  // Longest first, so that the last units are small enough to balance the threads.
  std::stable_sort(schedule.units.begin(), schedule.units.end(),
                   [](const Unit& x, const Unit& y) { return cost(x) > cost(y); });
}

// Returns why a step cannot be run, or null. Wrong numbers would write outside the pool. Entries of
// pages that no query reads are checked too: they are valid ids by contract.
const char* fault(const Session& s) {
  const Attention& a = s.common;
  if (s.num_rows && (a.query_starts[0] != 0 || a.query_starts[s.num_rows] != s.num_tokens))
    return "query_starts must run from 0 to the number of tokens";
  for (int32_t row = 0; row < s.num_rows; ++row) {
    const int32_t num_tokens = a.query_starts[row + 1] - a.query_starts[row];
    if (num_tokens < 0 || a.seq_lens[row] < num_tokens)
      return "seq_lens must count the row's own tokens too";
    if (s.row_windows && (s.row_sinks[row] < 0 || s.row_windows[row] < 1))
      return "a row's view must have a window";
    const int64_t pages = (int64_t(a.seq_lens[row]) + a.page_size - 1) / a.page_size;
    if (pages > a.table_stride) return "block_table has too few pages for a row";
    for (int64_t i = 0; i < pages; ++i) {
      const int32_t page = a.block_table[row * a.table_stride + i];
      if (page < 0 || page >= s.num_pages) return "block_table has a page outside the pool";
    }
  }
  for (int64_t token = 0; token < s.num_tokens; ++token)
    if (s.slots[token] < 0 || s.slots[token] >= s.num_pages * a.page_size)
      return "kv_slots has a slot outside the pool";
  return nullptr;
}

}  // namespace

float* scratch_of(Session& s, int64_t thread) {
  const auto start = reinterpret_cast<uintptr_t>(s.scratch.data());
  const uintptr_t line = kLineFloats * sizeof(float);
  return reinterpret_cast<float*>((start + line - 1) / line * line) + thread * scratch_floats(s);
}

Place place_of(Session& s, int32_t layer) {
  return s.places.empty() ? Place{&s, layer} : s.places[layer];
}

Attention attention_of(Session& s, int32_t layer, Rows keys, Rows values) {
  Attention a = s.common;
  LayerPages& pages = s.pages[layer];
  a.keys = pages.keys;
  a.values = pages.values;
  a.key_scales = pages.key_scales;
  a.value_scales = pages.value_scales;
  a.kv_dtype = pages.dtype;
  a.window = s.windows[layer];
  a.partials = s.partials.data();
  a.own = {keys,          values,     pages.desk_keys.data(), pages.desk_values.data(),
           s.desk_tokens, s.row_slots};
  return a;
}

Write key_write(const Session& s, int32_t layer, Rows keys) {
  const LayerPages& to = s.pages[layer];
  return {keys,    to.keys,               to.key_scales,    to.dtype,
          s.slots, s.common.num_kv_heads, s.common.head_dim};
}

Write value_write(const Session& s, int32_t layer, Rows values) {
  const LayerPages& to = s.pages[layer];
  return {values,  to.values,             to.value_scales,  to.dtype,
          s.slots, s.common.num_kv_heads, s.common.head_dim};
}

void attend(Session& s, const Attention& a, float* scratch) {
  const Schedule& schedule = s.schedules.find(a.window)->second;
  const int64_t num_units = schedule.units.size(), num_merges = schedule.merges.size();
#pragma omp for schedule(dynamic) nowait
  for (int64_t i = 0; i < num_units; ++i) s.kernels->attend(a, schedule.units[i], scratch);
  const bool has_desks = is_by_page(a.kv_dtype);
  if (!num_merges && !has_desks) return;
#pragma omp barrier
#pragma omp for nowait
  for (int64_t i = 0; i < num_merges; ++i) s.kernels->merge(a, schedule.merges[i]);
  if (!has_desks) return;
#pragma omp for schedule(dynamic) nowait
  for (int32_t row = 0; row < s.num_rows; ++row) fill_desk(s, a, row);
}

}  // namespace octavo

using namespace octavo;

extern "C" {

// `planes` is [layers, 4]: keys, values, and the scales of each, 0 where there are none. `desk_tokens`
// are those of a slot, where a layer's pages are encoded as a whole.
Session* octavo_attention_new(const Kernels* kernels, const int64_t* planes,
                              const int32_t* kv_dtypes, const int32_t* windows, int32_t num_layers,
                              int64_t num_pages, int32_t page_size, int32_t num_kv_heads,
                              int32_t group, int32_t head_dim, float scale, int32_t desk_tokens) {
  auto session = std::make_unique<Session>();
  session->kernels = kernels;
  session->num_pages = num_pages;
  session->unit_lanes = kTileLanes;
  for (int32_t layer = 0; layer < num_layers; ++layer, planes += 4) {
    const auto plane = [&](int i) { return reinterpret_cast<void*>(planes[i]); };
    const DType dtype = DType(kv_dtypes[layer]);
    session->pages.push_back({dtype, plane(0), plane(1), plane(2), plane(3), {}, {}});
    if (is_by_page(dtype)) session->desk_tokens = desk_tokens;
    session->unit_lanes = std::min(session->unit_lanes, kernels->unit_lanes(dtype));
    session->windows.push_back(windows[layer]);
    session->schedules[windows[layer]];
  }
  Attention& a = session->common;
  a = {};
  a.page_size = page_size;
  a.num_kv_heads = num_kv_heads;
  a.group = group;
  a.head_dim = head_dim;
  a.scale_log2e = scale * 1.44269504f;
  return session.release();
}

void octavo_attention_free(Session* session) { delete session; }

// Lets a decoder find the pages of all layers by one session: layer i of the model is `layers[i]` in
// `sessions[i]`, which outlive it. A step is planned in each of them.
void octavo_attention_join(Session* session, Session* const* sessions, const int32_t* layers,
                           int32_t num_layers) {
  session->places.clear();
  for (int32_t i = 0; i < num_layers; ++i) session->places.push_back({sessions[i], layers[i]});
}

// Sets the step. The caller owns the arrays and keeps them until the next plan. See `Session` for
// those of views. `row_slots` may be null where no page is encoded as a whole.
const char* octavo_attention_plan(Session* session, const int32_t* query_starts,
                                  const int32_t* seq_lens, const int32_t* block_table,
                                  int64_t table_stride, const int64_t* slots, int32_t num_rows,
                                  int64_t num_tokens, int32_t threads, const int32_t* row_sinks,
                                  const int32_t* row_windows, const int32_t* row_slots) {
  Session& s = *session;
  s.common.query_starts = query_starts;
  s.common.seq_lens = seq_lens;
  s.common.block_table = block_table;
  s.common.table_stride = table_stride;
  s.row_sinks = row_sinks;
  s.row_windows = row_windows;
  s.row_slots = row_slots;
  s.slots = slots;
  s.num_rows = num_rows;
  s.num_tokens = num_tokens;
  s.threads = threads;
  if (const char* message = fault(s)) return message;
  if (const char* message = plan_desks(s)) return message;
  const Attention& a = s.common;
  size_t partials = 0;
  for (auto& [window, schedule] : s.schedules) {
    fill(s, window, schedule);
    partials = std::max(partials, size_t(schedule.num_partials) * a.num_kv_heads * a.group *
                                      (a.head_dim + 2));
  }
  if (s.partials.size() < partials) s.partials.resize(partials);
  s.scratch.resize(scratch_floats(s) * threads + kLineFloats);
  return nullptr;
}

// Strides in elements: tokens, then heads. `out` is [tokens, heads, head_dim], contiguous. `sink_q` is
// read only where a row has sinks.
void octavo_attention_attend(Session* session, int32_t layer, int32_t dtype, void* q,
                             int64_t q_token_stride, int64_t q_head_stride, void* k,
                             int64_t k_token_stride, int64_t k_head_stride, void* v,
                             int64_t v_token_stride, int64_t v_head_stride, void* out,
                             void* sink_q, int64_t sink_q_token_stride,
                             int64_t sink_q_head_stride) {
  Session& s = *session;
  const Kernels& kernels = *s.kernels;
  const DType type = DType(dtype);
  const Rows key_rows = {k, k_token_stride, k_head_stride, type};
  const Rows value_rows = {v, v_token_stride, v_head_stride, type};
  Attention a = attention_of(s, layer, key_rows, value_rows);
  a.q = {q, q_token_stride, q_head_stride, type};
  a.sink_q = {sink_q, sink_q_token_stride, sink_q_head_stride, type};
  a.out = {out, int64_t(a.num_kv_heads) * a.group * a.head_dim, a.head_dim, type};
  const Schedule& schedule = s.schedules.find(a.window)->second;
  if (is_by_page(a.kv_dtype)) {
    in_parallel(num_page_heads(s, a), 8 * a.page_size * a.head_dim,
                [&](int64_t begin, int64_t end) { encode_page_heads(s, a, begin, end); });
  } else {
    const Write keys = key_write(s, layer, key_rows), values = value_write(s, layer, value_rows);
    in_parallel(s.num_tokens, 2 * a.num_kv_heads * a.head_dim, [&](int64_t begin, int64_t end) {
      kernels.write(keys, begin, end);
      kernels.write(values, begin, end);
    });
  }
#pragma omp parallel num_threads(s.threads) if (schedule.elements > 2 * kGrainElements)
  {
    attend(s, a, scratch_of(s, omp_get_thread_num()));
    kernels.release_tiles();
  }
}

}  // extern "C"
