// Four-bit codes with a scale and a minimum, by the least squared error of a group: the search of
// model/weights/round_integers.py, to the bit. So its sums have the same order, and products are
// rounded before they are added.
#pragma once

#include "simd.h"

namespace {

typedef uint8_t ByteVec __attribute__((vector_size(kWidth)));

inline float to_half_if_normal(float x) {
  Float16 half[kWidth];
  float rounded[kWidth];
  store(half, broadcast(x));
  store(rounded, load(half));
  const float magnitude = __builtin_fabsf(rounded[0]);
  return magnitude >= 0x1p-14f && magnitude <= 65504.0f ? rounded[0] : x;
}

// Adding 1.5 * 2^23 rounds to an integer, ties to even, which then stands in the low bits.
inline Vec to_integers(Vec x) { return x + broadcast(12582912.0f); }

inline void store_integers(uint8_t* to, Vec integers, int32_t offset) {
  const IntVec codes = bit_cast<IntVec>(integers) - 0x4b400000 + offset;
  const ByteVec bytes = __builtin_convertvector(codes, ByteVec);
  __builtin_memcpy(to, &bytes, sizeof(bytes));
}

// ---- the search --------------------------------------------------------------------------------

constexpr int kSearchedInputs = 32, kSearchedVectors = kSearchedInputs / kWidth;
constexpr int kMostNibble = 15, kNumTurns = 3;
// Steps by which the second beginning is too fine for the whole range.
constexpr int kFinest = 3;

// Keeps a product from becoming part of a fused multiply-add.
template <class T>
inline T rounded(T product) {
#if defined(__x86_64__)
  __asm__("" : "+x"(product));
#elif defined(__aarch64__)
  __asm__("" : "+w"(product));
#endif
  return product;
}

struct Searched {
  Vec values[kSearchedVectors];
};

// Adds halves until one number is left.
inline float folded(Searched g) {
  for (int half = kSearchedVectors / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) g.values[i] += g.values[i + half];
#if defined(__AVX2__)
#if defined(__AVX512F__)
  const __m512 all = bit_cast<__m512>(g.values[0]);
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
#else
  const __m256 eight = bit_cast<__m256>(g.values[0]);
#endif
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
#else
  float lanes[kWidth];
  store(lanes, g.values[0]);
  for (int half = kWidth / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
#endif
}

// Codes as floats; `integers` are the same as `store_integers` takes them.
struct Nibbles {
  Searched group;
  Vec integers[kSearchedVectors];
};

inline Nibbles nibbles_of(const Searched& x, float scale, float minimum) {
  Nibbles found;
  for (int i = 0; i < kSearchedVectors; ++i) {
    const Vec quotients = (x.values[i] - broadcast(minimum)) / broadcast(scale);
    found.integers[i] = to_integers(min(broadcast(kMostNibble), max(Vec{}, quotients)));
    found.group.values[i] = found.integers[i] - broadcast(12582912.0f);
  }
  return found;
}

// The scale and minimum of least squares for some codes; unchanged where all codes are equal.
inline void fit_line(const Searched& x, float sum_values, const Searched& codes, float& scale,
                     float& minimum) {
  Searched both, squares;
  for (int i = 0; i < kSearchedVectors; ++i) {
    both.values[i] = rounded(codes.values[i] * x.values[i]);
    squares.values[i] = rounded(codes.values[i] * codes.values[i]);
  }
  constexpr float count = kSearchedInputs;
  const float sum_codes = folded(codes), sum_both = folded(both);
  // Whole numbers, exact in any order.
  const float spread = count * folded(squares) - sum_codes * sum_codes;
  if (!(spread > 0.0f)) return;
  scale = (rounded(count * sum_both) - rounded(sum_codes * sum_values)) / spread;
  minimum = (sum_values - rounded(scale * sum_codes)) / count;
}

inline float error_of(const Searched& x, const Searched& codes, float scale, float minimum) {
  Searched squares;
  for (int i = 0; i < kSearchedVectors; ++i) {
    const Vec fitted = rounded(codes.values[i] * broadcast(scale)) + broadcast(minimum);
    const Vec rest = rounded(fitted - x.values[i]);
    squares.values[i] = rounded(rest * rest);
  }
  return folded(squares);
}

// Rounds 32 inputs, `count` of them present; returns the scale.
template <class T>
float search_group(const T* from, int64_t count, uint8_t* codes, float& minimum) {
  Searched x;
  Vec smallest, largest, rest = {};
  for (int i = 0; i < kSearchedVectors; ++i) {
    x.values[i] = load_some(from + i * kWidth, count - i * kWidth);
    smallest = i ? min(smallest, x.values[i]) : x.values[i];
    largest = i ? max(largest, x.values[i]) : x.values[i];
    // Zero, or NaN for infinities and NaN.
    rest += x.values[i] - x.values[i];
  }
  const float fault = sum(rest);
  if (fault != 0.0f) {
    __builtin_memset(codes, 0, kSearchedInputs);
    return minimum = fault;
  }
  float low = smallest[0], high = largest[0];
  for (int i = 1; i < kWidth; ++i) {
    low = smallest[i] < low ? smallest[i] : low;
    high = largest[i] > high ? largest[i] : high;
  }
  const float reach = high - low > 1e-30f ? high - low : 1e-30f, sum_values = folded(x);
  float best_scale = reach / kMostNibble, best_minimum = low, least = __builtin_inff();
  for (int beginning = 0; beginning <= kFinest; beginning += kFinest) {
    float one_scale = reach / float(kMostNibble + beginning);
    float one_minimum = low + rounded(one_scale * (float(beginning) / 2));
    for (int turn = 0; turn < kNumTurns; ++turn)
      fit_line(x, sum_values, nibbles_of(x, one_scale, one_minimum).group, one_scale, one_minimum);
    one_scale = to_half_if_normal(one_scale);
    one_minimum = to_half_if_normal(one_minimum);
    const float error =
        error_of(x, nibbles_of(x, one_scale, one_minimum).group, one_scale, one_minimum);
    if (error < least) {
      least = error;
      best_scale = one_scale;
      best_minimum = one_minimum;
    }
  }
  const Nibbles best = nibbles_of(x, best_scale, best_minimum);
  for (int i = 0; i < kSearchedVectors; ++i) store_integers(codes + i * kWidth, best.integers[i], 0);
  minimum = best_minimum;
  return best_scale;
}

}  // namespace
