// Products by matrix instructions (AMX). Included by products.h after products_vectors.h, which
// computes the products that these do not.
//
// Bfloat16 weights meet bfloat16 rows. Eight-bit weights meet rows of 15 bits, each number written
// as two eight-bit digits: x = row_scale * (256 * high + low). The products of both digits are exact
// integers until a scale of the weights is applied, so nothing but the weights is rounded to eight
// bits, and no weight is widened. Eight rows and their two digits fill the 16 rows of one tile, so a
// step of up to eight rows costs what one row costs.
#pragma once

namespace {

// The compiler has no model of tile loads from memory or of tile configuration:
// this keeps memory accesses in the order of the source.
inline void written_before() { asm volatile("" ::: "memory"); }

inline void configure_tiles() {
  alignas(64) struct {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } config;
  // Nor that all of the configuration is read.
  asm volatile("" : : "m"(config) : "memory");
  _tile_loadconfig(&config);
  written_before();
}

inline void release_tiles() { _tile_release(); }

// Rows that are multiplied before the next group of outputs: what the accumulators have room for.
constexpr int kBlockRows = 2 * kTileOutputs;

// ---- bfloat16 weights --------------------------------------------------------------------------


// One block of 16 rows and up to four output groups: accumulators 0 to 3.
template <int kSide>
inline void multiply_one(const BFloat16* a, int64_t a_bytes, const BFloat16* const* b, int count) {
  written_before();
  for (int t = 0; t < count; ++t, a += kTileInputs) {
    const int64_t at = int64_t(t) * kTileElements;
    _tile_loadd(4, a, a_bytes);
    _tile_loadd(5, b[0] + at, 64);
    _tile_dpbf16ps(0, 4, 5);
    if constexpr (kSide > 1) {
      _tile_loadd(6, b[1] + at, 64);
      _tile_dpbf16ps(1, 4, 6);
    }
    if constexpr (kSide > 2) {
      _tile_loadd(7, b[2] + at, 64);
      _tile_dpbf16ps(2, 4, 7);
    }
    if constexpr (kSide > 3) {
      _tile_loadd(5, b[3] + at, 64);
      _tile_dpbf16ps(3, 4, 5);
    }
  }
}

// Two blocks of 16 rows and two output groups: accumulators 0, 1 of the first rows, 2, 3.
inline void multiply_two(const BFloat16* a, int64_t a_bytes, const BFloat16* const* b, int count) {
  written_before();
  const BFloat16* below = (const BFloat16*)((const char*)a + kTileOutputs * a_bytes);
  for (int t = 0; t < count; ++t, a += kTileInputs, below += kTileInputs) {
    const int64_t at = int64_t(t) * kTileElements;
    _tile_loadd(4, a, a_bytes);
    _tile_loadd(5, below, a_bytes);
    _tile_loadd(6, b[0] + at, 64);
    _tile_loadd(7, b[1] + at, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}

inline void zero_accumulators() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

inline void store_accumulators(float* sums, bool is_two) {
  constexpr int64_t bytes = kSumsStride * sizeof(float);
  float* below = sums + kTileOutputs * kSumsStride;
  _tile_stored(0, sums, bytes);
  _tile_stored(1, sums + kTileOutputs, bytes);
  _tile_stored(2, is_two ? below : sums + 2 * kTileOutputs, bytes);
  _tile_stored(3, is_two ? below + kTileOutputs : sums + 3 * kTileOutputs, bytes);
  written_before();
}

template <int kSide>
inline void multiply_wide(const Product& p, int64_t group, float* sums) {
  const int64_t bytes = p.panel_stride * sizeof(BFloat16);
  const BFloat16* b[kSide];
  for (int side = 0; side < kSide; ++side)
    b[side] = (const BFloat16*)tiles_of(p, group_at(p, group, side));
  const int count = int(p.num_inputs / kTileInputs);
  const BFloat16* const pair[] = {b[0], b[kSide - 1]};
  for (int64_t row = 0; row < p.num_rows; row += kBlockRows) {
    const int64_t left = p.num_rows - row;
    const BFloat16* a = (const BFloat16*)p.panel + row * p.panel_stride;
    zero_accumulators();
    if (left > kTileOutputs) multiply_two(a, bytes, pair, count);
    else multiply_one<kSide>(a, bytes, b, count);
    store_accumulators(sums, left > kTileOutputs);
    finish(p, sums, kSumsStride, group, kSide, row, left < kBlockRows ? int(left) : kBlockRows);
  }
}

// ---- eight-bit weights -------------------------------------------------------------------------

// Rows whose digits share a tile, and the number of such blocks that the vector registers can hold.
constexpr int kDigitRows = 8;
constexpr int kMaxBlocks = 3;
// The largest 256 * high + low with both digits in -127 to 127.
constexpr float kMaxDigits = 127 * 256 + 127;

inline int64_t digit_rows(int64_t rows) { return (rows + kDigitRows - 1) / kDigitRows * kDigitRows; }

// The digits, and then a scale for each row.
inline int64_t digits_bytes(int64_t rows, int64_t num_inputs) {
  return digit_rows(rows) * (num_inputs * 2 + int64_t(sizeof(float)));
}

inline float* row_scales_of(const Product& p) {
  return (float*)((char*)p.split + digit_rows(p.num_rows) * p.num_inputs * 2);
}

inline int byte_tiles(const Product& p) { return int(p.num_inputs / kByteTileInputs); }

// The largest magnitude of a row, in its bits: those of positive numbers are in their order, and
// above them those of an infinity, then those of a NaN.
inline uint16_t largest_bits(const BFloat16* row, int64_t count) {
  __m512i largest = _mm512_setzero_si512();
  for (int64_t i = 0; i < count; i += 2 * kWidth)
    largest = _mm512_max_epu16(
        largest, _mm512_and_si512(_mm512_loadu_si512(row + i), _mm512_set1_epi16(0x7fff)));
  const __m512i even = _mm512_and_si512(largest, _mm512_set1_epi32(0xffff));
  return _mm512_reduce_max_epu32(_mm512_max_epu32(even, _mm512_srli_epi32(largest, 16)));
}

// Rows begin to end of the panel into digits [blocks of 8 rows, tiles, 8 high and 8 low, 64].
void split_digits(const Product& p, int64_t begin, int64_t end) {
  constexpr uint16_t kInfinityBits = 0x7f80;
  int8_t* digits = (int8_t*)p.split;
  float* row_scales = row_scales_of(p);
  const int64_t tiles = byte_tiles(p);
  for (int64_t row = begin; row < end; ++row) {
    const BFloat16* from = (const BFloat16*)p.panel + row * p.panel_stride;
    const uint16_t bits = largest_bits(from, p.num_inputs);
    const float largest = bit_cast<float>(uint32_t(bits) << 16);
    // NaN and infinity make the whole row NaN, since infinity times zero is NaN.
    row_scales[row] = bits < kInfinityBits ? largest / kMaxDigits : __builtin_inff();
    const bool has_scale = bits > 0 && bits < kInfinityBits;
    const Vec factor = broadcast(has_scale ? kMaxDigits / largest : 0.0f);
    int8_t* to = digits + (row / kDigitRows * tiles * kTileOutputs + row % kDigitRows) * kByteTileInputs;
    for (int64_t i = 0; i < p.num_inputs; i += kWidth) {
      const Vec x = has_scale ? load(from + i) * factor : Vec{};
      const __m256i whole = _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(bit_cast<__m512>(x)));
      const __m256i high = _mm256_srai_epi16(_mm256_add_epi16(whole, _mm256_set1_epi16(128)), 8);
      int8_t* at = to + i / kByteTileInputs * kByteTileElements + i % kByteTileInputs;
      _mm_store_si128((__m128i*)at, _mm256_cvtepi16_epi8(high));
      // The remainder after 256 * high is the low byte, with a sign.
      _mm_store_si128((__m128i*)(at + kDigitRows * kByteTileInputs), _mm256_cvtepi16_epi8(whole));
    }
  }
}

// Prefetches: far enough ahead for memory, near enough for the first cache.
inline void prefetch(const int8_t* tile) {
  constexpr int kAheadBytes = 8192;
  for (int line = 0; line < kByteTileElements; line += 64)
    _mm_prefetch((const char*)tile + kAheadBytes + line, _MM_HINT_T0);
}

// Writes the exact sums of tiles first to end of `kBlocks` blocks to integers [blocks, 16, 16].
template <int kBlocks, bool kIsFirst>
inline void multiply_tiles(const int8_t* a, int64_t block_bytes, const int8_t* b, int first, int end,
                           int32_t* whole) {
  _tile_zero(0);
  if constexpr (kBlocks > 1) _tile_zero(1);
  if constexpr (kBlocks > 2) _tile_zero(2);
  for (int64_t at = int64_t(first) * kByteTileElements; at < int64_t(end) * kByteTileElements;
       at += kByteTileElements) {
    if constexpr (kIsFirst) prefetch(b + at);
    _tile_loadd(7, b + at, 64);
    _tile_loadd(4, a + at, 64);
    _tile_dpbssd(0, 4, 7);
    if constexpr (kBlocks > 1) {
      _tile_loadd(5, a + block_bytes + at, 64);
      _tile_dpbssd(1, 5, 7);
    }
    if constexpr (kBlocks > 2) {
      _tile_loadd(6, a + 2 * block_bytes + at, 64);
      _tile_dpbssd(2, 6, 7);
    }
  }
  _tile_stored(0, whole, 64);
  if constexpr (kBlocks > 1) _tile_stored(1, whole + 256, 64);
  if constexpr (kBlocks > 2) _tile_stored(2, whole + 512, 64);
  written_before();
}

// The sums of one output group for `kBlocks` blocks of rows, to [8 * kBlocks, kSumsStride].
template <int kBlocks, bool kIsFirst>
inline void multiply_digits(const Product& p, int64_t output_group, int64_t block, float* sums) {
  const int tiles = byte_tiles(p);
  const int64_t block_bytes = int64_t(tiles) * kByteTileElements;
  const int scale_tiles = int(p.weights.group_inputs / kByteTileInputs);
  const int8_t* a = (const int8_t*)p.split + block * block_bytes;
  const int8_t* b = (const int8_t*)tiles_of(p, output_group);
  const float* scales = (const float*)p.weights.scales + output_group * num_scales(p) * kTileOutputs;
  alignas(64) int32_t whole[kBlocks * 256];
  Vec total[kBlocks * kDigitRows] = {};
  for (int first = 0; first < tiles; first += scale_tiles, scales += kTileOutputs) {
    multiply_tiles<kBlocks, kIsFirst>(a, block_bytes, b, first,
                                      smaller(first + scale_tiles, tiles), whole);
    const Vec scale = load(scales);
#pragma GCC unroll 24
    for (int i = 0; i < kBlocks * kDigitRows; ++i) {
      const int32_t* high = whole + (i / kDigitRows * kTileOutputs + i % kDigitRows) * kTileOutputs;
      const IntVec both = (bit_cast<IntVec>(load((const float*)high)) << 8) +
                          bit_cast<IntVec>(load((const float*)high + kDigitRows * kTileOutputs));
      total[i] = multiply_add(__builtin_convertvector(both, Vec), scale, total[i]);
    }
  }
  const float* row_scales = row_scales_of(p) + block * kDigitRows;
#pragma GCC unroll 24
  for (int i = 0; i < kBlocks * kDigitRows; ++i)
    store(sums + i * kSumsStride, total[i] * row_scales[i]);
}

template <bool kIsFirst>
inline void multiply_blocks(const Product& p, int64_t output_group, int64_t block, int count,
                            float* sums) {
  if (count == 1) multiply_digits<1, kIsFirst>(p, output_group, block, sums);
  if (count == 2) multiply_digits<2, kIsFirst>(p, output_group, block, sums);
  if (count == 3) multiply_digits<3, kIsFirst>(p, output_group, block, sums);
}

template <int kSide>
inline void multiply_bytes(const Product& p, int64_t group, float* sums) {
  const int64_t blocks = (p.num_rows + kDigitRows - 1) / kDigitRows;
  for (int64_t block = 0; block < blocks;) {
    const int64_t left = blocks - block;
    const int count = left == 4 ? 2 : left < kMaxBlocks ? int(left) : kMaxBlocks;
    for (int side = 0; side < kSide; ++side) {
      const int64_t output_group = group_at(p, group, side);
      float* to = sums + side * kTileOutputs;
      if (block == 0) multiply_blocks<true>(p, output_group, block, count, to);
      else multiply_blocks<false>(p, output_group, block, count, to);
    }
    const int64_t row = block * kDigitRows, rows = p.num_rows - row;
    finish(p, sums, kSumsStride, group, kSide, row, smaller(count * kDigitRows, rows));
    block += count;
  }
}

// ---- for products.h ----------------------------------------------------------------------------

// Bfloat16 weights, and eight-bit ones whose scales are for whole tiles.
inline bool is_by_matrix(const Product& p) {
  const Weights& w = p.weights;
  return w.bits == 16 || (w.bits == 8 && w.activation_bits == 16 && w.group_inputs % kByteTileInputs == 0 && !w.minimums &&
                          w.scale_dtype == kFloat32);
}

template <int kSide>
inline void multiply_side(const Product& p, int64_t group, float* sums) {
  if (p.weights.scales) multiply_bytes<kSide>(p, group, sums);
  else multiply_wide<kSide>(p, group, sums);
}

// With two blocks of rows there is room for two groups; eight-bit ones come one after the other.
inline void product_by_matrix(const Product& p, int64_t begin, int64_t end, float* sums) {
  const auto multiply = [&](int side, int64_t group) {
    if (side == 4) multiply_side<4>(p, group, sums);
    if (side == 2) multiply_side<2>(p, group, sums);
    if (side == 1) multiply_side<1>(p, group, sums);
  };
  product_by(multiply, p.weights.scales || p.num_rows > kTileOutputs ? 2 : kMaxSide, p, begin, end);
}

}  // namespace
