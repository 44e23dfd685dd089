// V: a vector of 16 f32 lanes on every machine (one AVX-512 register, two of AVX2, four of 128 bits), so that one source serves
// all. Pairs: 16 lanes of two bf16 each. Nothing here rounds other than to nearest even.
//
// All of it has internal linkage or lives in the namespace of its instruction set (see kernels.h). The generic form uses the
// vector extension of GCC and Clang, which compiles for every 64-bit platform.
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
#if defined(MEDUSA_SIMD_AVX2) && defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && \
    defined(__AVX512DQ__) && defined(__AVX512BF16__)
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

#if defined(MEDUSA_SIMD_AVX512)

using V = __m512;
struct Pairs {
  __m512bh v;
};

MEDUSA_INLINE V splat(float x) { return _mm512_set1_ps(x); }
MEDUSA_INLINE V add(V a, V b) { return _mm512_add_ps(a, b); }
MEDUSA_INLINE V sub(V a, V b) { return _mm512_sub_ps(a, b); }
MEDUSA_INLINE V mul(V a, V b) { return _mm512_mul_ps(a, b); }
MEDUSA_INLINE V div(V a, V b) { return _mm512_div_ps(a, b); }
MEDUSA_INLINE V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
MEDUSA_INLINE V max(V a, V b) { return _mm512_max_ps(a, b); }  // b where either is NaN
MEDUSA_INLINE V min(V a, V b) { return _mm512_min_ps(a, b); }  // b where either is NaN
MEDUSA_INLINE V load(const float* p) { return _mm512_loadu_ps(p); }
MEDUSA_INLINE void store(float* p, V x) { _mm512_storeu_ps(p, x); }
MEDUSA_INLINE V load(const F16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
MEDUSA_INLINE void store(F16* p, V x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
MEDUSA_INLINE V load(const Bf16* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
MEDUSA_INLINE void store(Bf16* p, V x) {  // not vcvtneps2bf16, which flushes denormals
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff));
  rounded = _mm512_mask_or_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), bits,
                                 _mm512_set1_epi32(0x400000));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}
// 2^n where t = 1.5 * 2^23 + n, -126 <= n <= 127.
MEDUSA_INLINE V pow2_of_shifted(V t) {
  return _mm512_castsi512_ps(
      _mm512_add_epi32(_mm512_slli_epi32(_mm512_castps_si512(t), 23), _mm512_set1_epi32(0x3f800000)));
}
// x, but 0 where a < b.
MEDUSA_INLINE V zero_if_less(V a, V b, V x) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ), x);
}
MEDUSA_INLINE uint32_t greater_mask(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }

MEDUSA_INLINE Pairs load_pairs(const Bf16* p) {
  return {reinterpret_cast<__m512bh>(_mm512_loadu_si512(p))};
}
MEDUSA_INLINE Pairs splat_pair(const Bf16* p) {
  int bits;
  __builtin_memcpy(&bits, p, 4);
  return {reinterpret_cast<__m512bh>(_mm512_set1_epi32(bits))};
}
MEDUSA_INLINE V dot(V sum, Pairs a, Pairs b) { return _mm512_dpbf16_ps(sum, a.v, b.v); }

#elif defined(MEDUSA_SIMD_AVX2)

struct V {
  __m256 a, b;
};
struct Pairs {
  V even, odd;
};

MEDUSA_INLINE V splat(float x) {
  const __m256 v = _mm256_set1_ps(x);
  return {v, v};
}
#define MEDUSA_LANEWISE(name, intrinsic) \
  MEDUSA_INLINE V name(V x, V y) { return {intrinsic(x.a, y.a), intrinsic(x.b, y.b)}; }
MEDUSA_LANEWISE(add, _mm256_add_ps)
MEDUSA_LANEWISE(sub, _mm256_sub_ps)
MEDUSA_LANEWISE(mul, _mm256_mul_ps)
MEDUSA_LANEWISE(div, _mm256_div_ps)
MEDUSA_LANEWISE(max, _mm256_max_ps)  // the second where either is NaN
MEDUSA_LANEWISE(min, _mm256_min_ps)
#undef MEDUSA_LANEWISE
MEDUSA_INLINE V fma(V x, V y, V z) {
  return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
MEDUSA_INLINE V load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
MEDUSA_INLINE void store(float* p, V x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
MEDUSA_INLINE __m128i load_128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
MEDUSA_INLINE void store_128(void* p, __m128i x) { _mm_storeu_si128(static_cast<__m128i*>(p), x); }
MEDUSA_INLINE V load(const F16* p) {
  return {_mm256_cvtph_ps(load_128(p)), _mm256_cvtph_ps(load_128(p + 8))};
}
MEDUSA_INLINE void store(F16* p, V x) {
  store_128(p, _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT));
  store_128(p + 8, _mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT));
}
MEDUSA_INLINE __m256 widen(const Bf16* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_128(p)), 16));
}
MEDUSA_INLINE V load(const Bf16* p) { return {widen(p), widen(p + 8)}; }
MEDUSA_INLINE __m128i narrow(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7fff));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256 nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
  const __m256i chosen = _mm256_srli_epi32(
      _mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(rounded), _mm256_castsi256_ps(quiet), nan)), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(chosen), _mm256_extracti128_si256(chosen, 1));
}
MEDUSA_INLINE void store(Bf16* p, V x) {
  store_128(p, narrow(x.a));
  store_128(p + 8, narrow(x.b));
}
MEDUSA_INLINE __m256 pow2_of_shifted(__m256 t) {
  return _mm256_castsi256_ps(
      _mm256_add_epi32(_mm256_slli_epi32(_mm256_castps_si256(t), 23), _mm256_set1_epi32(0x3f800000)));
}
// 2^n where t = 1.5 * 2^23 + n, -126 <= n <= 127.
MEDUSA_INLINE V pow2_of_shifted(V t) { return {pow2_of_shifted(t.a), pow2_of_shifted(t.b)}; }
// x, but 0 where a < b.
MEDUSA_INLINE V zero_if_less(V a, V b, V x) {
  return {_mm256_and_ps(_mm256_cmp_ps(a.a, b.a, _CMP_NLT_UQ), x.a),
          _mm256_and_ps(_mm256_cmp_ps(a.b, b.b, _CMP_NLT_UQ), x.b)};
}
MEDUSA_INLINE uint32_t greater_mask(V x, V y) {
  const int low = _mm256_movemask_ps(_mm256_cmp_ps(x.a, y.a, _CMP_GT_OQ));
  const int high = _mm256_movemask_ps(_mm256_cmp_ps(x.b, y.b, _CMP_GT_OQ));
  return static_cast<uint32_t>(low | high << 8);
}

MEDUSA_INLINE __m256 even_of(__m256i pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)); }
MEDUSA_INLINE __m256 odd_of(__m256i pairs) {
  return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
}
MEDUSA_INLINE Pairs load_pairs(const Bf16* p) {
  const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 16));
  return {{even_of(a), even_of(b)}, {odd_of(a), odd_of(b)}};
}
MEDUSA_INLINE Pairs splat_pair(const Bf16* p) {
  int bits;
  __builtin_memcpy(&bits, p, 4);
  const __m256i pair = _mm256_set1_epi32(bits);
  const __m256 even = even_of(pair), odd = odd_of(pair);
  return {{even, even}, {odd, odd}};
}
MEDUSA_INLINE V dot(V sum, Pairs a, Pairs b) { return fma(a.odd, b.odd, fma(a.even, b.even, sum)); }

#else

typedef float F4 __attribute__((vector_size(16)));
typedef uint32_t U4 __attribute__((vector_size(16)));

struct V {
  F4 a, b, c, d;
};
struct Pairs {
  V even, odd;
};

MEDUSA_INLINE F4 splat_4(float x) { return F4{x, x, x, x}; }
MEDUSA_INLINE V splat(float x) { return {splat_4(x), splat_4(x), splat_4(x), splat_4(x)}; }
#define MEDUSA_LANEWISE(name, expression)             \
  MEDUSA_INLINE F4 name(F4 x, F4 y) { return expression; } \
  MEDUSA_INLINE V name(V x, V y) {                    \
    return {name(x.a, y.a), name(x.b, y.b), name(x.c, y.c), name(x.d, y.d)}; \
  }
MEDUSA_LANEWISE(add, x + y)
MEDUSA_LANEWISE(sub, x - y)
MEDUSA_LANEWISE(mul, x * y)
MEDUSA_LANEWISE(div, x / y)
MEDUSA_LANEWISE(max, x > y ? x : y)  // the second where either is NaN
MEDUSA_LANEWISE(min, x < y ? x : y)
#undef MEDUSA_LANEWISE
MEDUSA_INLINE V fma(V x, V y, V z) { return add(mul(x, y), z); }  // two roundings: a fused one may be a library call
MEDUSA_INLINE V load(const float* p) {
  V x;
  __builtin_memcpy(&x, p, sizeof(x));
  return x;
}
MEDUSA_INLINE void store(float* p, V x) { __builtin_memcpy(p, &x, sizeof(x)); }

MEDUSA_INLINE float widen(F16 x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
  if (rest >= 0x7c00) {  // infinity or NaN, made quiet as the hardware does
    return float_of(sign | 0x7f800000u | (rest & 0x3ff) << 13 | (rest > 0x7c00 ? 0x400000u : 0));
  }
  if (rest < 0x400) {  // rest * 2^-24 is exact
    const float value = static_cast<float>(rest) * 0x1p-24f;
    return sign != 0 ? -value : value;
  }
  return float_of(sign | ((rest << 13) + (112u << 23)));
}
MEDUSA_INLINE F16 narrow_f16(float x) {
  const uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000u, rest = bits & 0x7fffffffu;
  uint32_t half;
  if (rest > 0x7f800000u) {
    half = 0x7e00u | (rest >> 13 & 0x3ff);
  } else if (rest >= 0x477ff000u) {  // 65520 and more round to infinity
    half = 0x7c00u;
  } else if (rest < 0x38800000u) {  // below 2^-14: adding 0.5 leaves the value in units of 2^-24, rounded
    half = bits_of(float_of(rest) + 0.5f) - bits_of(0.5f);
  } else {
    half = (rest - (112u << 23) + 0xfffu + (rest >> 13 & 1u)) >> 13;
  }
  return {static_cast<uint16_t>(sign | half)};
}
MEDUSA_INLINE Bf16 narrow_bf16(float x) {
  const uint32_t bits = bits_of(x);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return {static_cast<uint16_t>((nan ? bits | 0x400000u : bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}
MEDUSA_INLINE V load(const F16* p) {
  float x[kLanes];
  for (int i = 0; i < kLanes; ++i) x[i] = widen(p[i]);
  return load(x);
}
MEDUSA_INLINE void store(F16* p, V v) {
  float x[kLanes];
  store(x, v);
  for (int i = 0; i < kLanes; ++i) p[i] = narrow_f16(x[i]);
}
MEDUSA_INLINE V load(const Bf16* p) {
  float x[kLanes];
  for (int i = 0; i < kLanes; ++i) x[i] = float_of(static_cast<uint32_t>(p[i].bits) << 16);
  return load(x);
}
MEDUSA_INLINE void store(Bf16* p, V v) {
  float x[kLanes];
  store(x, v);
  for (int i = 0; i < kLanes; ++i) p[i] = narrow_bf16(x[i]);
}
MEDUSA_INLINE F4 pow2_of_shifted(F4 t) { return (F4)(((U4)t << 23) + 0x3f800000u); }
// 2^n where t = 1.5 * 2^23 + n, -126 <= n <= 127.
MEDUSA_INLINE V pow2_of_shifted(V t) {
  return {pow2_of_shifted(t.a), pow2_of_shifted(t.b), pow2_of_shifted(t.c), pow2_of_shifted(t.d)};
}
MEDUSA_INLINE F4 zero_if_less(F4 a, F4 b, F4 x) { return (F4)((U4)x & ~(U4)(a < b)); }
// x, but 0 where a < b.
MEDUSA_INLINE V zero_if_less(V a, V b, V x) {
  return {zero_if_less(a.a, b.a, x.a), zero_if_less(a.b, b.b, x.b), zero_if_less(a.c, b.c, x.c),
          zero_if_less(a.d, b.d, x.d)};
}
MEDUSA_INLINE uint32_t greater_mask(V x, V y) {
  float a[kLanes], b[kLanes];
  store(a, x);
  store(b, y);
  uint32_t mask = 0;
  for (int i = 0; i < kLanes; ++i) mask |= static_cast<uint32_t>(a[i] > b[i]) << i;
  return mask;
}

MEDUSA_INLINE Pairs load_pairs(const Bf16* p) {  // by value, so that either byte order works
  U4 w[4], even[4], odd[4];
  __builtin_memcpy(w, p, sizeof(w));
  for (int i = 0; i < 4; ++i) {
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    even[i] = w[i] << 16;
    odd[i] = w[i] & 0xffff0000u;
#else
    even[i] = w[i] & 0xffff0000u;
    odd[i] = w[i] << 16;
#endif
  }
  return {{(F4)even[0], (F4)even[1], (F4)even[2], (F4)even[3]}, {(F4)odd[0], (F4)odd[1], (F4)odd[2], (F4)odd[3]}};
}
MEDUSA_INLINE Pairs splat_pair(const Bf16* p) {
  return {splat(float_of(static_cast<uint32_t>(p[0].bits) << 16)), splat(float_of(static_cast<uint32_t>(p[1].bits) << 16))};
}
MEDUSA_INLINE V dot(V sum, Pairs a, Pairs b) { return fma(a.odd, b.odd, fma(a.even, b.even, sum)); }

#endif

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

// e^x to about 1 ulp (2 without fma); below -87.3 it is 0, above 88.3 it stays at e^88.3, NaN stays NaN.
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
