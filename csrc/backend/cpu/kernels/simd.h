// V: a vector of 16 f32 lanes on every machine (one AVX-512 register, two of AVX2, four of 128
// bits), so that one source serves all. Pairs: 16 lanes of two bf16 each. I: 16 lanes of 32-bit
// integers. Bytes: 16 lanes of four bytes each. Nothing here rounds other than to nearest even. All
// of it has internal linkage or lives in the namespace of its instruction set (see kernels.h).
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push  // GCC 12 warns about its own undefined source operands
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
#define MEDUSA_SIMD_AVX2 1
#endif
#if defined(MEDUSA_SIMD_AVX2) && defined(__AVX512F__) && defined(__AVX512BW__) && \
    defined(__AVX512VL__) && defined(__AVX512DQ__) && defined(__AVX512BF16__) &&  \
    defined(__AVX512VNNI__)
#define MEDUSA_SIMD_AVX512 1
#endif

#define MEDUSA_INLINE static inline __attribute__((always_inline))

namespace medusa::cpu::MEDUSA_ISA {

constexpr int kLanes = 16;

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

MEDUSA_INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits;
}
MEDUSA_INLINE float float_of(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}

}  // namespace medusa::cpu::MEDUSA_ISA

#if defined(MEDUSA_SIMD_AVX512)
#include "backend/cpu/kernels/simd_avx512.h"
#elif defined(MEDUSA_SIMD_AVX2)
#include "backend/cpu/kernels/simd_avx2.h"
#else
#include "backend/cpu/kernels/simd_generic.h"
#endif

namespace medusa::cpu::MEDUSA_ISA {

MEDUSA_INLINE V zero() { return splat(0.0f); }

// The first n lanes of p, the rest `fill`; 0 <= n <= 16.
template <class T>
MEDUSA_INLINE V load_some(const T* p, int64_t n, float fill = 0.0f) {
  if (n >= kLanes) return load(p);
  T lanes[kLanes] = {};
  __builtin_memcpy(lanes, p, static_cast<size_t>(n) * sizeof(T));
  float x[kLanes];
  store(x, load(lanes));
  for (int64_t i = n; i < kLanes; ++i) x[i] = fill;
  return load(x);
}
template <class T>
MEDUSA_INLINE void store_some(T* p, V x, int64_t n) {
  if (n >= kLanes) return store(p, x);
  T lanes[kLanes];
  store(lanes, x);
  __builtin_memcpy(p, lanes, static_cast<size_t>(n) * sizeof(T));
}

// Sums and maxima over the lanes, halving: (i, i + 8), (i, i + 4), ...; the same tree everywhere.
// The maximum of two is the second where either is NaN.
#if defined(MEDUSA_SIMD_AVX2)
MEDUSA_INLINE float sum_of(V v) {
  const __m256 eight = _mm256_add_ps(low_half(v), high_half(v));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
MEDUSA_INLINE float max_of(V v) {
  const __m256 eight = _mm256_max_ps(low_half(v), high_half(v));
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
#else
MEDUSA_INLINE float sum_of(V v) {
  float x[kLanes];
  store(x, v);
  for (int half = 8; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) x[i] += x[i + half];
  }
  return x[0];
}
MEDUSA_INLINE float max_of(V v) {
  float x[kLanes];
  store(x, v);
  for (int half = 8; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) x[i] = x[i] > x[i + half] ? x[i] : x[i + half];
  }
  return x[0];
}
#endif

// e^x to about 1 ulp (2 without fma); below -87.3 it is 0, above 88.3 it stays at e^88.3, NaN stays
// NaN.
MEDUSA_INLINE V exp(V x) {
  const V lowest = splat(-87.3f), shift = splat(12582912.0f);  // 1.5 * 2^23
  const V clamped = min(splat(88.3f), max(lowest, x));
  const V shifted = fma(clamped, splat(1.44269504f), shift);
  const V n = sub(shifted, shift);
  // r = x - n ln 2, in two parts: the first has 15 bits, so that n times it is exact
  const V r = fma(n, splat(-1.42860677e-6f), fma(n, splat(-0.693145752f), clamped));
  V p = splat(1.0f / 720);
  p = fma(p, r, splat(1.0f / 120));
  p = fma(p, r, splat(1.0f / 24));
  p = fma(p, r, splat(1.0f / 6));
  p = fma(p, r, splat(0.5f));
  p = fma(mul(p, r), r, r);
  return zero_if_less(x, lowest, mul(add(p, splat(1.0f)), pow2_of_shifted(shifted)));
}

}  // namespace medusa::cpu::MEDUSA_ISA
