// Keys and values to their pages, as floats or as codes.
//
// Codes and scales are those of model/kv/codes.py to the bit, on every instruction set: each number
// is the result of the same operations in float32.
#pragma once

#include "hadamard.h"

namespace {

using octavo::Write;

constexpr uint16_t kNoNumber = 0x7fc0;

// The scale of a vector, as it is stored and as it divides.
struct Scale {
  uint16_t bits;
  float value;
};

// A finite number, rounded to bfloat16 towards plus infinity.
inline Scale rounded_up(float x) {
  const uint32_t word = bit_cast<uint32_t>(x);
  // Cutting off the lower bits of a negative number is up already.
  const uint32_t up = (word >> 31 ? word : word + 0xffff) & 0xffff0000;
  return {uint16_t(up >> 16), bit_cast<float>(up)};
}

inline bool is_finite(float x) { return (bit_cast<uint32_t>(x) & 0x7fffffff) < 0x7f800000; }

// Returns the largest magnitude; not finite where an element is not.
inline float largest_magnitude(const float* x, int64_t dim) {
  WordVec top = {};
  // As integers: of floats, NaN is neither larger nor smaller than another.
  for (int64_t d = 0; d < dim; d += kWidth) {
    const WordVec magnitude = bit_cast<WordVec>(load(x + d)) & 0x7fffffff;
    top = magnitude > top ? magnitude : top;
  }
#if defined(__AVX512F__)
  const uint32_t most = _mm512_reduce_max_epu32(bit_cast<__m512i>(top));
#else
  uint32_t most = 0;
  for (int i = 0; i < kWidth; ++i) most = top[i] > most ? top[i] : most;
#endif
  return bit_cast<float>(most);
}

// Rounds to the nearest integer, to even between two, for numbers up to 2^22.
inline Vec rounded(Vec x) {
  const Vec magic = broadcast(12582912.0f);
  return (x + magic) - magic;
}

// A number up to 448 as an 8-bit float of four bits of exponent and three of mantissa.
inline WordVec float8_of(Vec x) {
  const WordVec word = bit_cast<WordVec>(x), bits = word & 0x7fffffff;
  const Vec magnitude = bit_cast<Vec>(bits);
  // Normal: move the exponent's bias, round to even at bit 20. Subnormal: let the adder round.
  const WordVec normal = (bits - (120u << 23) + 0x7ffff + ((bits >> 20) & 1)) >> 20;
  const WordVec subnormal = bit_cast<WordVec>(magnitude + 16384.0f) - 0x46800000;
  return (magnitude < 0x1p-6f ? subnormal : normal) | (word >> 24 & 0x80);
}

// Puts codes of a byte each, a multiple of eight, into as few bits as they have: the first of a byte
// into its lowest bits.
template <int kBits>
inline void pack_codes(const uint8_t* codes, int64_t count, uint8_t* to) {
  for (int64_t i = 0; i < count; i += 8, to += kBits) {
    uint64_t x;
    __builtin_memcpy(&x, codes + i, sizeof(x));
    // Of neighbours, the second comes to lie behind the first.
    x = (x | x >> (8 - kBits)) & (kBits == 4 ? 0x00ff00ff00ff00ff : 0x000f000f000f000f);
    x |= x >> (16 - 2 * kBits);
    x &= kBits == 4 ? 0x0000ffff0000ffff : 0x000000ff000000ff;
    x |= x >> (32 - 4 * kBits);
    __builtin_memcpy(to, &x, kBits);
  }
}

inline void store_bytes(uint8_t* to, WordVec words) {
  typedef uint8_t Bytes __attribute__((vector_size(kWidth)));
  const Bytes bytes = __builtin_convertvector(words, Bytes);
  __builtin_memcpy(to, &bytes, sizeof(bytes));
}

// Rounds steps from a minimum on to codes of a byte each; NaN becomes 0.
template <int kBits>
inline void store_steps(Vec steps, uint8_t* to) {
  const Vec bounded = min(max(steps, Vec{}), broadcast((1 << kBits) - 1));
  store_bytes(to, bit_cast<WordVec>(__builtin_convertvector(rounded(bounded), IntVec)));
}

// int8 and fp8: steps of a scale, on both sides of zero. Returns the scale's bits.
template <DType kCode>
inline uint16_t encode_symmetric(const float* x, int64_t dim, uint8_t* to) {
  constexpr float kLargest = kCode == kInt8 ? 127.0f : 448.0f;
  const float most = largest_magnitude(x, dim);
  const Scale scale = rounded_up(most / kLargest);
  // Vectors of zeros, and those with an element that is not finite.
  if (!is_finite(most) || !(scale.value > 0)) {
    __builtin_memset(to, 0, dim);
    return is_finite(most) ? scale.bits : kNoNumber;
  }
  for (int64_t d = 0; d < dim; d += kWidth) {
    const Vec steps = load(x + d) / scale.value;
    const Vec bounded = max(broadcast(-kLargest), min(broadcast(kLargest), steps));
    if constexpr (kCode == kInt8)
      store_bytes(to + d, bit_cast<WordVec>(__builtin_convertvector(rounded(bounded), IntVec)));
    else
      store_bytes(to + d, float8_of(bounded));
  }
  return scale.bits;
}

// Steps of a scale from a minimum on. Writes the scale and the minimum.
template <int kBits>
inline void encode_asymmetric(const float* x, int64_t dim, uint8_t* to, uint16_t* scales) {
  constexpr float kLargest = (1 << kBits) - 1;
  const bool is_any_lost = !is_finite(largest_magnitude(x, dim));
  Vec least = load(x), most = least;
  for (int64_t d = kWidth; d < dim; d += kWidth)
    least = min(load(x + d), least), most = max(load(x + d), most);
  // Both roundings widen the range, so that no code lies outside. Adding zeros turns -0 into 0.
  const float minimum = -rounded_up(-smallest_of(least)).value + 0.0f;
  const float spread = largest_of(most) - minimum + 0.0f;
  const Scale scale = rounded_up(spread / kLargest);
  if (is_any_lost || !is_finite(spread)) {
    scales[0] = kNoNumber, scales[1] = 0;
    __builtin_memset(to, 0, dim * kBits / 8);
    return;
  }
  scales[0] = scale.bits, scales[1] = uint16_t(bit_cast<uint32_t>(minimum) >> 16);
  const float divisor = scale.value > 0 ? scale.value : __builtin_inff();
  uint8_t codes[octavo::kMaxHeadDim];
  for (int64_t d = 0; d < dim; d += kWidth)
    store_steps<kBits>((load(x + d) - minimum) / divisor, codes + d);
  pack_codes<kBits>(codes, dim, to);
}

// Encodes the vector of a token and head, the `vector`-th of the plane.
inline void encode(const Write& w, float* x, int64_t vector) {
  const int64_t dim = w.head_dim;
  uint8_t* codes = (uint8_t*)w.to;
  uint16_t* scales = (uint16_t*)w.scales;
  if (is_rotated(w.to_dtype)) hadamard(x, int(dim));
  if (w.to_dtype == kInt8)
    scales[vector] = encode_symmetric<kInt8>(x, dim, codes + vector * dim);
  else if (w.to_dtype == kFloat8)
    scales[vector] = encode_symmetric<kFloat8>(x, dim, codes + vector * dim);
  else
    encode_asymmetric<4>(x, dim, codes + vector * dim / 2, scales + 2 * vector);
}

// Stores the keys (or values) of tokens begin to end in their slots.
void write(const Write& w, int64_t begin, int64_t end) {
  alignas(64) float codable[octavo::kMaxHeadDim];
  for (int64_t token = begin; token < end; ++token)
    for (int64_t head = 0; head < w.num_kv_heads; ++head) {
      const int64_t from = token * w.from.token_stride + head * w.from.head_stride;
      const int64_t vector = w.slots[token] * w.num_kv_heads + head;
      for (int64_t d = 0; d < w.head_dim; d += kWidth) {
        const Vec x = load_some(w.from.data, w.from.dtype, from + d, w.head_dim - d);
        if (is_coded(w.to_dtype))
          store(codable + d, x);
        else
          store_some(w.to, w.to_dtype, vector * w.head_dim + d, x, w.head_dim - d);
      }
      if (is_coded(w.to_dtype)) encode(w, codable, vector);
    }
}

}  // namespace
