// Desks: the newest keys and values of each slot in full precision, where pages are encoded as a whole.
//
// A desk is a ring. It has room for the page that is being filled, and for the tokens of a draft, which
// may be rejected. The other tokens of a step are read from the step itself.

#include <algorithm>

#include "attention.h"

namespace octavo {
namespace {

void grow(Session& s, size_t num_slots) {
  if (s.desks.size() >= num_slots) return;
  s.desks.resize(num_slots);
  const size_t floats =
      num_slots * s.desk_tokens * s.common.num_kv_heads * size_t(s.common.head_dim);
  for (LayerPages& pages : s.pages) {
    if (!is_by_page(pages.dtype)) continue;
    pages.desk_keys.resize(floats);
    pages.desk_values.resize(floats);
  }
}

}  // namespace

const char* plan_desks(Session& s) {
  s.whole_pages.clear();
  if (!s.desk_tokens) return nullptr;
  if (!s.row_slots) return "slots are missing, and pages are encoded as a whole";
  s.desk_places.assign(s.num_tokens, 0);
  const Attention& a = s.common;
  const int32_t size = a.page_size;
  for (int32_t row = 0; row < s.num_rows; ++row) {
    const int32_t token = a.query_starts[row], count = a.query_starts[row + 1] - token;
    const int32_t end = a.seq_lens[row], first = end - count, slot = s.row_slots[row];
    if (!count) continue;
    if (slot < 0) return "a row's slot is negative";
    grow(s, size_t(slot) + 1);
    DeskTokens& desk = s.desks[slot];
    const int32_t page_begin = first / size * size;
    // A sequence comes to its slot at the border of a page.
    if (page_begin == first) desk = {first, first};
    if (page_begin < std::max(desk.begin, desk.end - s.desk_tokens) || first > desk.end)
      return "tokens of a row's page are not on its slot's desk";
    desk.end = end;
    for (int32_t page = first / size; page < end / size; ++page)
      s.whole_pages.push_back({row, page});
    for (int32_t i = 0; i < count; ++i)
      s.desk_places[token + i] = int64_t(slot) * s.desk_tokens + (first + i) % s.desk_tokens;
  }
  return nullptr;
}

int64_t num_page_heads(const Session& s, const Attention& a) {
  return int64_t(s.whole_pages.size()) * a.num_kv_heads;
}

void encode_page_heads(const Session& s, const Attention& a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i)
    s.kernels->encode_page(a, s.whole_pages[i / a.num_kv_heads], int32_t(i % a.num_kv_heads));
}

void fill_desk(const Session& s, const Attention& a, int32_t row) {
  const int64_t end = a.query_starts[row + 1];
  const int64_t begin = std::max<int64_t>(a.query_starts[row], end - s.desk_tokens);
  const OwnPages& own = a.own;
  for (const Write& w : {Write{own.keys, own.desk_keys}, Write{own.values, own.desk_values}}) {
    Write write = w;
    write.to_dtype = kFloat32;
    write.slots = s.desk_places.data();
    write.num_kv_heads = a.num_kv_heads;
    write.head_dim = a.head_dim;
    s.kernels->write(write, begin, end);
  }
}

}  // namespace octavo
