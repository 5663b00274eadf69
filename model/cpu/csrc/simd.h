// Vectors of floats as wide as the instruction set of this translation unit.
//
// GCC's vector extensions (clang has them too), and a few intrinsics where those have no equivalent.
// Everything is in an anonymous namespace, and the C++ library is not used: see kernels.h.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "kernels.h"

// OCTAVO_NEON is a flag of the build: plain C++ is compiled for the same CPUs, as their oracle.
#if defined(OCTAVO_NEON) && defined(__ARM_FEATURE_DOTPROD)
#define OCTAVO_NEON_DOTPROD
#endif
#if defined(OCTAVO_NEON) && defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define OCTAVO_NEON_BF16
#endif
#if defined(OCTAVO_NEON) && defined(__ARM_FEATURE_MATMUL_INT8)
#define OCTAVO_NEON_I8MM
#endif
// Pairs of bfloat16 are multiplied and added by one instruction.
#if defined(__AVX512BF16__) || defined(OCTAVO_NEON_BF16)
#define OCTAVO_BF16_PAIRS
#endif

namespace {

using octavo::DType;
using octavo::kBFloat16;
using octavo::kFloat16;
using octavo::kFloat32;
using octavo::kFloat8;
using octavo::kInt4;
using octavo::kInt8;
using octavo::kKivi2;
using octavo::kKivi4;
using octavo::is_by_page;

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif
// AVX-512 and NEON have 32 registers, others 16.
#if defined(__AVX512F__) || defined(OCTAVO_NEON)
constexpr bool kHasManyRegisters = true;
#else
constexpr bool kHasManyRegisters = false;
#endif

typedef float Vec __attribute__((vector_size(kWidth * 4)));
typedef int32_t IntVec __attribute__((vector_size(kWidth * 4)));
typedef uint32_t WordVec __attribute__((vector_size(kWidth * 4)));
typedef uint16_t HalfVec __attribute__((vector_size(kWidth * 2)));

struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};
// Of four bits of exponent and three of mantissa: e4m3fn.
struct Float8 {
  uint8_t bits;
};

// Whether pages of this type are codes of single vectors, with scales beside them.
constexpr bool is_coded(DType dtype) { return dtype >= kInt8 && !is_by_page(dtype); }

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

constexpr int smaller(int a, int b) { return a < b ? a : b; }
constexpr int larger(int a, int b) { return a > b ? a : b; }

// x - 0 folds away, 0 + x does not (the sign of zero).
inline Vec broadcast(float x) { return x - Vec{}; }
// a * b + c in one rounding where there is such an instruction: the compiler chooses otherwise, and
// not the same everywhere.
inline Vec multiply_add(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return bit_cast<Vec>(
      _mm512_fmadd_ps(bit_cast<__m512>(a), bit_cast<__m512>(b), bit_cast<__m512>(c)));
#elif defined(__FMA__)
  return bit_cast<Vec>(
      _mm256_fmadd_ps(bit_cast<__m256>(a), bit_cast<__m256>(b), bit_cast<__m256>(c)));
#elif defined(__aarch64__)
  return bit_cast<Vec>(vfmaq_f32(bit_cast<float32x4_t>(c), bit_cast<float32x4_t>(a),
                                 bit_cast<float32x4_t>(b)));
#else
  return a * b + c;
#endif
}
inline Vec max(Vec a, Vec b) { return a > b ? a : b; }
inline Vec min(Vec a, Vec b) { return a < b ? a : b; }

inline float sum(Vec v) {
  float total = 0.0f;
  for (int i = 0; i < kWidth; ++i) total += v[i];
  return total;
}

inline float largest_of(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(bit_cast<__m512>(v));
#elif defined(OCTAVO_NEON)
  return vmaxvq_f32(bit_cast<float32x4_t>(v));
#else
  float top = v[0];
  for (int i = 1; i < kWidth; ++i) top = v[i] > top ? v[i] : top;
  return top;
#endif
}
inline float smallest_of(Vec v) { return -largest_of(-v); }

// ---- loads and stores with conversion ----------------------------------------------------------

inline Vec load(const float* from) {
  Vec v;
  __builtin_memcpy(&v, from, sizeof(v));
  return v;
}

inline Vec load(const BFloat16* from) {
#if defined(__AVX512F__)
  const __m512i word = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from));
  return bit_cast<Vec>(_mm512_slli_epi32(word, 16));
#elif defined(__AVX2__)
  const __m256i word = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from));
  return bit_cast<Vec>(_mm256_slli_epi32(word, 16));
#else
  HalfVec half;
  __builtin_memcpy(&half, from, sizeof(half));
  return bit_cast<Vec>(__builtin_convertvector(half, WordVec) << 16);
#endif
}

inline Vec load(const Float16* from) {
#if defined(__AVX512F__)
  return bit_cast<Vec>(_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from)));
#elif defined(__F16C__)
  return bit_cast<Vec>(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from)));
#elif defined(OCTAVO_NEON)
  return bit_cast<Vec>(vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const uint16_t*)from))));
#else
  HalfVec half;
  __builtin_memcpy(&half, from, sizeof(half));
  const WordVec word = __builtin_convertvector(half, WordVec);
  // The exponent's bias differs by 112; the product is right for subnormals too.
  const Vec magnitude = bit_cast<Vec>((word & 0x7fff) << 13) * 0x1p112f;
  const WordVec special = bit_cast<WordVec>((word & 0x7c00) == 0x7c00) & 0x7f800000;
  return bit_cast<Vec>(bit_cast<WordVec>(magnitude) | special | ((word & 0x8000) << 16));
#endif
}

inline Vec load(const int8_t* from) {
#if defined(__AVX512F__)
  const __m512i wide = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from));
  return bit_cast<Vec>(_mm512_cvtepi32_ps(wide));
#elif defined(__AVX2__)
  const __m256i wide = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from));
  return bit_cast<Vec>(_mm256_cvtepi32_ps(wide));
#else
  Vec v;
  for (int i = 0; i < kWidth; ++i) v[i] = from[i];
  return v;
#endif
}

inline Vec load(const int16_t* from) {
#if defined(__AVX512F__)
  const __m512i wide = _mm512_cvtepi16_epi32(_mm256_loadu_si256((const __m256i*)from));
  return bit_cast<Vec>(_mm512_cvtepi32_ps(wide));
#else
  Vec v;
  for (int i = 0; i < kWidth; ++i) v[i] = from[i];
  return v;
#endif
}

// Loads 8-bit floats as 2^-8 of their values: their bits are then those of 16-bit floats.
inline Vec load(const Float8* from) {
#if defined(__AVX512F__)
  const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)from));
  const __m256i half = _mm256_and_si256(_mm256_slli_epi16(wide, 7), _mm256_set1_epi16(int16_t(0xbf80)));
  return bit_cast<Vec>(_mm512_cvtph_ps(half));
#elif defined(__F16C__)
  const __m128i wide = _mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i*)from));
  const __m128i half = _mm_and_si128(_mm_slli_epi16(wide, 7), _mm_set1_epi16(int16_t(0xbf80)));
  return bit_cast<Vec>(_mm256_cvtph_ps(half));
#else
  HalfVec half;
  for (int i = 0; i < kWidth; ++i)
    half[i] = uint16_t((from[i].bits & 0x80) << 8 | (from[i].bits & 0x7f) << 7);
  return load((const Float16*)&half);
#endif
}

inline void store(float* to, Vec v) { __builtin_memcpy(to, &v, sizeof(v)); }

inline void store(BFloat16* to, Vec v) {
#if defined(__AVX512BF16__)
  _mm256_storeu_si256((__m256i*)to, bit_cast<__m256i>(_mm512_cvtneps_pbh(bit_cast<__m512>(v))));
#elif defined(OCTAVO_NEON_BF16)
  const bfloat16x4_t half = vcvt_bf16_f32(bit_cast<float32x4_t>(v));
  __builtin_memcpy(to, &half, sizeof(half));
#else
  const WordVec word = bit_cast<WordVec>(v);
  const WordVec rounded = (word + 0x7fff + ((word >> 16) & 1)) >> 16;
  // Rounding would carry a NaN into infinity: keep it quiet instead.
  const HalfVec half =
      __builtin_convertvector(v == v ? rounded : ((word >> 16) | 0x40), HalfVec);
  __builtin_memcpy(to, &half, sizeof(half));
#endif
}

inline void store(Float16* to, Vec v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)to, _mm512_cvtps_ph(bit_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128((__m128i*)to, _mm256_cvtps_ph(bit_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(OCTAVO_NEON)
  const float16x4_t half = vcvt_f16_f32(bit_cast<float32x4_t>(v));
  __builtin_memcpy(to, &half, sizeof(half));
#else
  const WordVec word = bit_cast<WordVec>(v);
  const WordVec sign = (word >> 16) & 0x8000;
  const Vec magnitude = bit_cast<Vec>(word & 0x7fffffff);
  // Normal: move the exponent's bias, round to even at bit 13. Subnormal: let the adder round.
  const WordVec bits = bit_cast<WordVec>(magnitude);
  const WordVec normal = (bits - (112u << 23) + 0xfff + ((bits >> 13) & 1)) >> 13;
  const WordVec subnormal = bit_cast<WordVec>(magnitude + 0.5f) - 0x3f000000;
  const WordVec finite = magnitude < 0x1p-14f ? subnormal : normal;
  const WordVec bounded = magnitude < 65520.0f ? finite : WordVec{} + 0x7c00;
  const HalfVec half =
      __builtin_convertvector((magnitude == magnitude ? bounded : WordVec{} + 0x7e00) | sign, HalfVec);
  __builtin_memcpy(to, &half, sizeof(half));
#endif
}

// Two vectors, one after the other.
inline void store(BFloat16* to, Vec first, Vec second) {
#if defined(__AVX512BF16__)
  const auto both = _mm512_cvtne2ps_pbh(bit_cast<__m512>(second), bit_cast<__m512>(first));
  _mm512_storeu_si512(to, bit_cast<__m512i>(both));
#else
  store(to, first);
  store(to + kWidth, second);
#endif
}

// Up to kWidth elements; the vector's other lanes are zero.
template <class T>
inline Vec load_some(const T* from, int64_t count) {
  if (count >= kWidth) return load(from);
  T full[kWidth] = {};
  for (int64_t i = 0; i < count; ++i) full[i] = from[i];
  return load(full);
}

template <class T>
inline void store_some(T* to, Vec v, int64_t count) {
  if (count >= kWidth) return store(to, v);
  T full[kWidth];
  store(full, v);
  for (int64_t i = 0; i < count; ++i) to[i] = full[i];
}

// The same for a dtype known at run time; `at` counts elements.
inline Vec load_some(const void* from, DType dtype, int64_t at, int64_t count) {
  switch (dtype) {
    case kFloat16: return load_some((const Float16*)from + at, count);
    case kBFloat16: return load_some((const BFloat16*)from + at, count);
    default: return load_some((const float*)from + at, count);
  }
}

inline void store_some(void* to, DType dtype, int64_t at, Vec v, int64_t count) {
  switch (dtype) {
    case kFloat16: return store_some((Float16*)to + at, v, count);
    case kBFloat16: return store_some((BFloat16*)to + at, v, count);
    default: return store_some((float*)to + at, v, count);
  }
}

inline int64_t bytes_of(DType dtype) { return dtype == kFloat32 ? 4 : 2; }

// ---- arithmetic --------------------------------------------------------------------------------

// 2^r on [-1/2, 1/2]: a Chebyshev fit, 2.5e-9 relative before rounding.
inline Vec exp2_of_rest(Vec r) {
  Vec p = broadcast(1.546144472e-4f);
  p = p * r + 1.340042818e-3f;
  p = p * r + 9.618056678e-3f;
  p = p * r + 5.550327227e-2f;
  p = p * r + 2.402265092e-1f;
  p = p * r + 6.931472067e-1f;
  return p * r + 1.0f;
}

// 2 to the power of x, with a relative error of 2e-7: zero below -126, at most 2^127, NaN for NaN.
inline Vec exp2(Vec x) {
  const Vec bounded = min(broadcast(127.0f), max(broadcast(-126.0f), x));
  // Adding 1.5 * 2^23 rounds to an integer, which then stands in the low bits.
  const Vec magic = broadcast(12582912.0f);
  const Vec shifted = bounded + magic;
  const IntVec exponent = bit_cast<IntVec>(shifted) << 23;
  const Vec r = bounded - (shifted - magic);
  const Vec power = bit_cast<Vec>(bit_cast<IntVec>(exp2_of_rest(r)) + exponent);
  return bit_cast<Vec>(bit_cast<IntVec>(power) & ~(x < -126.0f));
}

// The sums of four vectors, to out[0..3].
inline void sum4(Vec a, Vec b, Vec c, Vec d, float* out) {
#if defined(__AVX512F__)
  const __m512 A = bit_cast<__m512>(a), B = bit_cast<__m512>(b);
  const __m512 C = bit_cast<__m512>(c), D = bit_cast<__m512>(d);
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(A, B), _mm512_unpackhi_ps(A, B));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(C, D), _mm512_unpackhi_ps(C, D));
  const __m512 abcd = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
#elif defined(__AVX2__)
  const __m256 A = bit_cast<__m256>(a), B = bit_cast<__m256>(b);
  const __m256 C = bit_cast<__m256>(c), D = bit_cast<__m256>(d);
  const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(A, B), _mm256_unpackhi_ps(A, B));
  const __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(C, D), _mm256_unpackhi_ps(C, D));
  const __m256 half = _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
#elif defined(OCTAVO_NEON)
  const float32x4_t ab = vpaddq_f32(bit_cast<float32x4_t>(a), bit_cast<float32x4_t>(b));
  const float32x4_t cd = vpaddq_f32(bit_cast<float32x4_t>(c), bit_cast<float32x4_t>(d));
  vst1q_f32(out, vpaddq_f32(ab, cd));
#else
  out[0] = sum(a);
  out[1] = sum(b);
  out[2] = sum(c);
  out[3] = sum(d);
#endif
}

#if defined(__AVX512F__)
// The sums of four vectors, to out[0..3] as floats.
inline void sum4(IntVec a, IntVec b, IntVec c, IntVec d, float* out) {
  const __m512i A = bit_cast<__m512i>(a), B = bit_cast<__m512i>(b);
  const __m512i C = bit_cast<__m512i>(c), D = bit_cast<__m512i>(d);
  const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(A, B), _mm512_unpackhi_epi32(A, B));
  const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(C, D), _mm512_unpackhi_epi32(C, D));
  const __m512i abcd =
      _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  const __m256i half =
      _mm256_add_epi32(_mm512_castsi512_si256(abcd), _mm512_extracti64x4_epi64(abcd, 1));
  const __m128i sums =
      _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  _mm_storeu_ps(out, _mm_cvtepi32_ps(sums));
}
#endif

}  // namespace
