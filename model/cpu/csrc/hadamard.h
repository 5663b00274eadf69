// The orthonormal Hadamard transform, its own inverse, that vectors of codes are rotated by: see `is_rotated`.
#pragma once

#include "simd.h"

namespace {

// Whether the codes of such pages are of rotated vectors.
inline bool is_rotated(octavo::DType kv_dtype) { return kv_dtype == kInt8 || kv_dtype == kInt4; }

// Vector whose lane i is x's lane i ^ distance.
template <int kDistance>
inline Vec partners(Vec x) {
#if defined(__AVX512F__)
  const __m512 v = bit_cast<__m512>(x);
  if constexpr (kDistance == 1) return bit_cast<Vec>(_mm512_permute_ps(v, 0xb1));
  if constexpr (kDistance == 2) return bit_cast<Vec>(_mm512_permute_ps(v, 0x4e));
  if constexpr (kDistance == 4) return bit_cast<Vec>(_mm512_shuffle_f32x4(v, v, 0xb1));
  return bit_cast<Vec>(_mm512_shuffle_f32x4(v, v, 0x4e));
#elif defined(__AVX2__)
  const __m256 v = bit_cast<__m256>(x);
  if constexpr (kDistance == 1) return bit_cast<Vec>(_mm256_permute_ps(v, 0xb1));
  if constexpr (kDistance == 2) return bit_cast<Vec>(_mm256_permute_ps(v, 0x4e));
  return bit_cast<Vec>(_mm256_permute2f128_ps(v, v, 1));
#else
  Vec y;
  for (int i = 0; i < kWidth; ++i) y[i] = x[i ^ kDistance];
  return y;
#endif
}

// Replaces elements at this distance by their sum and their difference, within vectors.
template <int kDistance>
inline Vec sums_and_differences(Vec x) {
  IntVec signs;
  for (int i = 0; i < kWidth; ++i) signs[i] = i & kDistance ? INT32_MIN : 0;
  return partners<kDistance>(x) + bit_cast<Vec>(bit_cast<IntVec>(x) ^ signs);
}

// The first stages, whose partners are in one vector.
inline Vec transformed_within(Vec x) {
  Vec v = sums_and_differences<2>(sums_and_differences<1>(x));
  if constexpr (kWidth > 4) v = sums_and_differences<4>(v);
  if constexpr (kWidth > 8) v = sums_and_differences<8>(v);
  return v;
}

// A block of so many vectors, with all stages in registers.
template <int kVectors>
inline void transform_block(float* x, float factor) {
  Vec v[kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kVectors; ++i) v[i] = transformed_within(load(x + i * kWidth));
#pragma GCC unroll 4
  for (int distance = 1; distance < kVectors; distance *= 2)
#pragma GCC unroll 16
    for (int i = 0; i < kVectors; ++i) {
      if (i & distance) continue;
      const Vec left = v[i], right = v[i + distance];
      v[i] = left + right, v[i + distance] = left - right;
    }
#pragma GCC unroll 16
  for (int i = 0; i < kVectors; ++i) store(x + i * kWidth, v[i] * factor);
}

// Transforms blocks as long as the largest power of two that divides `dim`, a multiple of 16. The
// order of operations is that of `hadamard` in model/kv/codes.py. Not inlined: the compiler must not
// join the last product and a later sum to one rounding.
__attribute__((noinline)) void hadamard(float* x, int dim) {
  const int block = dim & -dim;
  const float factor = float(1.0 / __builtin_sqrt(double(block)));
  if (dim == 64) return transform_block<64 / kWidth>(x, factor);
  for (int d = 0; d < dim; d += kWidth) store(x + d, transformed_within(load(x + d)));
  for (int distance = kWidth; distance < block; distance *= 2)
    for (int first = 0; first < dim; first += 2 * distance)
      for (int d = first; d < first + distance; d += kWidth) {
        const Vec left = load(x + d), right = load(x + d + distance);
        store(x + d, left + right);
        store(x + d + distance, left - right);
      }
  for (int d = 0; d < dim; d += kWidth) store(x + d, load(x + d) * factor);
}

}  // namespace
