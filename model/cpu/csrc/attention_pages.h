// Pages that are encoded as a whole (KIVI; model/kv/page_codes.py has the definition): keys by channel
// over the tokens of a page, values by token in groups of elements.
//
// A query reads its own page in full precision and the pages before it as codes, so the rows of a chunk
// are brought together as elements of the products: scale * code + minimum, rounded to bfloat16.
#pragma once

#include "attention_vectors.h"

namespace {

// Stands for the type of such pages, of kKivi4 as of kKivi2.
struct WholePages {
  uint16_t bits;
};

// Their rows enter products as those of bfloat16 pages do.
template <>
struct Operands<WholePages> : Operands<BFloat16> {
  static constexpr bool kIsWidened = false;
};

constexpr int bits_of(DType kv_dtype) { return kv_dtype == kKivi4 ? 4 : 2; }

// Elements of a value that share a scale: as many as divide the head, up to 64 or 32.
inline int value_group(const Attention& a) {
  const int most = a.kv_dtype == kKivi4 ? 64 : 32, power = a.head_dim & -a.head_dim;
  return smaller(power, most);
}

// ---- full precision ----------------------------------------------------------------------------

// A vector that is not encoded: of the step, or on a desk.
struct FullRow {
  const void* data;
  DType dtype;
  int64_t from;

  Vec load(int d) const { return load_some(data, dtype, from + d, kWidth); }
};

// Finds the keys (or values) of a row and head by their stored indices.
class FullRows {
 public:
  FullRows(const Attention& a, int row, int head, bool are_values)
      : a_(a), rows_(are_values ? a.own.values : a.own.keys),
        desk_(are_values ? a.own.desk_values : a.own.desk_keys),
        first_token_(a.query_starts[row]), first_(a.seq_lens[row] - num_tokens(a, row)),
        slot_(a.own.slots[row]), head_(head) {}

  FullRow at(int index) const {
    if (index >= first_)
      return {rows_.data, rows_.dtype,
              (first_token_ + index - first_) * rows_.token_stride + head_ * rows_.head_stride};
    const int64_t token = int64_t(slot_) * a_.own.desk_tokens + index % a_.own.desk_tokens;
    return {desk_, kFloat32, (token * a_.num_kv_heads + head_) * a_.head_dim};
  }

 private:
  static int num_tokens(const Attention& a, int row) {
    return a.query_starts[row + 1] - a.query_starts[row];
  }

  const Attention& a_;
  const octavo::Rows& rows_;
  const float* desk_;
  const int64_t first_token_;
  const int first_, slot_, head_;
};

// ---- codes -------------------------------------------------------------------------------------

// Loads kWidth codes.
template <int kBits>
inline Vec load_codes(const uint8_t* from) {
  constexpr int kPerWord = 32 / kBits;
  WordVec words, shifts;
  for (int i = 0; i < kWidth; ++i) shifts[i] = i % kPerWord * kBits;
#if defined(__AVX512F__)
  if constexpr (kBits == 4) {
    uint32_t halves[2];
    __builtin_memcpy(halves, from, sizeof(halves));
    words = bit_cast<WordVec>(_mm512_mask_set1_epi32(_mm512_set1_epi32(halves[0]), 0xff00, halves[1]));
  } else
#endif
  {
    static_assert(kWidth * kBits <= 32);
    uint32_t word = 0;
    __builtin_memcpy(&word, from, kWidth * kBits / 8);
    words = WordVec{} + word;
  }
  const WordVec codes = (words >> shifts) & ((1 << kBits) - 1);
  return __builtin_convertvector(bit_cast<IntVec>(codes), Vec);
}

// Stores numbers that enter products, rounded to bfloat16. NaN is quiet: no rounding carries it over.
inline void store_rounded(BFloat16* to, Vec v) { store(to, v); }
inline void store_rounded(float* to, Vec v) {
  const WordVec word = bit_cast<WordVec>(v);
  store(to, bit_cast<Vec>((word + 0x7fff + ((word >> 16) & 1)) & 0xffff0000));
}

// Writes one group of a value's elements: all codes have one scale and minimum.
template <int kBits, class Element>
inline void bring_group(const uint8_t* codes, int group, float scale, float minimum, Element* to) {
  for (int d = 0; d < group; d += kWidth) {
    const Vec x = load_codes<kBits>(codes + d * kBits / 8);
    store_rounded(to + d, multiply_add(x, broadcast(scale), broadcast(minimum)));
  }
}

#if defined(__AVX512BF16__)
// Loads 32 codes, each in the lowest bits of a word. The bits above have no meaning.
template <int kBits>
inline __m512i load_indices(const uint8_t* from) {
  if constexpr (kBits == 4) {
    const __m256i pairs = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)from));
    return _mm512_cvtepu8_epi16(_mm256_or_si256(pairs, _mm256_slli_epi16(pairs, 4)));
  }
  int64_t bytes;
  __builtin_memcpy(&bytes, from, sizeof(bytes));
  // Each byte goes to the four words of its codes.
  const auto four = [](int64_t byte) { return int64_t(0x8000800080008000) + byte * 0x1000100010001; };
  const __m512i places = _mm512_setr_epi64(four(0), four(1), four(2), four(3), four(4), four(5),
                                           four(6), four(7));
  const __m512i spread = _mm512_shuffle_epi8(_mm512_set1_epi64(bytes), places);
  return _mm512_srlv_epi16(spread, _mm512_set1_epi64(0x0006000400020000));
}

// The same by a table of the numbers that codes stand for, repeated over 32 words.
template <int kBits>
inline void bring_group(const uint8_t* codes, int group, float scale, float minimum, BFloat16* to) {
  constexpr int kNumCodes = 1 << kBits;
  if (group % 32) return bring_group<kBits, BFloat16>(codes, group, scale, minimum, to);
  Vec steps;
  for (int i = 0; i < kWidth; ++i) steps[i] = i % kNumCodes;
  const Vec numbers = multiply_add(steps, broadcast(scale), broadcast(minimum));
  const __m512 both = bit_cast<__m512>(numbers);
  const __m512i table = (__m512i)_mm512_cvtne2ps_pbh(both, both);
  for (int d = 0; d < group; d += 32)
    _mm512_storeu_si512(
        to + d, _mm512_permutexvar_epi16(load_indices<kBits>(codes + d * kBits / 8), table));
}
#endif

// Scales and minimums of kWidth channels, which lie in pairs.
struct ChannelScales {
  Vec scale;
  Vec minimum;

  explicit ChannelScales(const uint16_t* pairs) {
    WordVec words;
    __builtin_memcpy(&words, pairs, sizeof(words));
    scale = bit_cast<Vec>(words << 16);
    minimum = bit_cast<Vec>(words & 0xffff0000);
  }
};

// Writes kWidth channels of the keys of neighbouring tokens, whose codes are `stride` bytes apart.
template <int kBits, class Element>
inline void bring_channels(const uint8_t* codes, int64_t stride, int count, const uint16_t* pairs,
                           int dim, Element* to) {
  const ChannelScales s(pairs);
  for (int i = 0; i < count; ++i, codes += stride, to += dim)
    store_rounded(to, multiply_add(load_codes<kBits>(codes), s.scale, s.minimum));
}

#if defined(__AVX512BF16__)
// The same of 32 channels.
template <int kBits>
inline void bring_channel_pairs(const uint8_t* codes, int64_t stride, int count,
                                const uint16_t* pairs, int dim, BFloat16* to) {
  const ChannelScales low(pairs), high(pairs + 2 * kWidth);
  const __m512i mask = _mm512_set1_epi16((1 << kBits) - 1);
  const auto number = [](__m256i words, const ChannelScales& s) {
    const Vec x = bit_cast<Vec>(_mm512_cvtepi32_ps(_mm512_cvtepu16_epi32(words)));
    return bit_cast<__m512>(multiply_add(x, s.scale, s.minimum));
  };
  for (int i = 0; i < count; ++i, codes += stride, to += dim) {
    const __m512i words = _mm512_and_si512(load_indices<kBits>(codes), mask);
    const __m512 first = number(_mm512_castsi512_si256(words), low);
    const __m512 second = number(_mm512_extracti64x4_epi64(words, 1), high);
    _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(second, first));
  }
}
#endif

// Brings the rows of a chunk to elements, for one KV head and queries of one page.
template <class Element>
class PageRows {
 public:
  // `own_begin`: the stored index of the first token of the queries' page. `room`: the rows that are
  // kept, a power of two: key i goes to row i % room of [room, head_dim].
  PageRows(const Attention& a, int row, int head, int own_begin, const Chunk& chunk, int room)
      : a_(a), table_(a.block_table + row * a.table_stride), row_(row), head_(head),
        own_begin_(own_begin - chunk.first), first_(chunk.first), room_(room) {}

  // Reads the keys (or values) from `begin` to `end`, counted from the chunk's first.
  void read(int begin, int end, bool are_values, Element* to) const {
    const int own = smaller(larger(own_begin_, begin), end);
    a_.kv_dtype == kKivi4 ? read_codes<4>(begin, own, are_values, to)
                          : read_codes<2>(begin, own, are_values, to);
    const FullRows full(a_, row_, head_, are_values);
    for (int key = own; key < end; ++key) {
      const FullRow row = full.at(first_ + key);
      for (int d = 0; d < a_.head_dim; d += kWidth) store(to + offset(key) + d, row.load(d));
    }
  }

  int64_t offset(int key) const { return int64_t(key & (room_ - 1)) * a_.head_dim; }

 private:
  template <int kBits>
  void read_codes(int begin, int end, bool are_values, Element* to) const {
    for (int key = begin, count; key < end; key += count) {
      const int index = first_ + key, page = index / a_.page_size, at = index % a_.page_size;
      count = smaller(smaller(a_.page_size - at, end - key), room_ - (key & (room_ - 1)));
      const int64_t token = int64_t(table_[page]) * a_.page_size + at;
      if (are_values)
        read_values<kBits>(token, count, to + offset(key));
      else
        read_keys<kBits>(table_[page], token, count, to + offset(key));
    }
  }

  // Of `count` tokens of one page, from the pool's `token` on.
  template <int kBits>
  void read_keys(int64_t page, int64_t token, int count, Element* to) const {
    const int dim = a_.head_dim, row_bytes = dim * kBits / 8;
    const int64_t stride = int64_t(a_.num_kv_heads) * row_bytes;
    const uint8_t* codes = (const uint8_t*)a_.keys + token * stride + head_ * row_bytes;
    const uint16_t* pairs =
        (const uint16_t*)a_.key_scales + (page * a_.num_kv_heads + head_) * dim * 2;
    int d = 0;
#if defined(__AVX512BF16__)
    for (; d + 2 * kWidth <= dim; d += 2 * kWidth)
      bring_channel_pairs<kBits>(codes + d * kBits / 8, stride, count, pairs + 2 * d, dim, to + d);
#endif
    for (; d < dim; d += kWidth)
      bring_channels<kBits>(codes + d * kBits / 8, stride, count, pairs + 2 * d, dim, to + d);
  }

  template <int kBits>
  void read_values(int64_t token, int count, Element* to) const {
    const int dim = a_.head_dim, group = value_group(a_), row_pairs = 2 * (dim / group);
    const int64_t vector = token * a_.num_kv_heads + head_, row_bytes = dim * kBits / 8;
    const uint8_t* codes = (const uint8_t*)a_.values + vector * row_bytes;
    const uint16_t* pairs = (const uint16_t*)a_.value_scales + vector * row_pairs;
    for (int i = 0; i < count; ++i, to += dim) {
      const uint16_t* at = pairs;
      for (int d = 0; d < dim; d += group, at += 2)
        bring_group<kBits>(codes + d * kBits / 8, group, wide(at[0]), wide(at[1]), to + d);
      codes += a_.num_kv_heads * row_bytes;
      pairs += a_.num_kv_heads * row_pairs;
    }
  }

  const Attention& a_;
  const int32_t* table_;
  const int row_, head_, own_begin_, first_, room_;
};

// The rows of one head that few lanes meet: brought a tile at a time, while it is in the nearest cache.
template <class Element>
struct TiledRows : HeadRows<Element> {
  const PageRows<Element>& pages;

  TiledRows(const PageRows<Element>& rows, const HeadRows<Element>& head)
      : HeadRows<Element>(head), pages(rows) {}

  void bring_keys(int from, int to) const { bring(from, to, false, this->keys); }
  void bring_values(int from, int to) const { bring(from, to, true, this->values); }

 private:
  void bring(int from, int to, bool are_values, const Element* where) const {
    // Other keys have the offset of the first or the last of these.
    pages.read(larger(from, this->begin), smaller(to, this->end), are_values,
               const_cast<Element*>(where));
  }
};

}  // namespace
