// V, Pairs, I and Bytes for AVX-512 with BF16 and VNNI: one register each. Included by simd.h
// alone.
// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace medusa::cpu::MEDUSA_ISA {

using V = __m512;
struct Pairs {
  __m512bh v;
};
struct I {
  __m512i v;
};
struct Bytes {
  __m512i v;
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
  return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_slli_epi32(_mm512_castps_si512(t), 23),
                                              _mm512_set1_epi32(0x3f800000)));
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

MEDUSA_INLINE I zero_i() { return {_mm512_setzero_si512()}; }
MEDUSA_INLINE I splat_i(const void* p) {
  int32_t x;
  __builtin_memcpy(&x, p, 4);
  return {_mm512_set1_epi32(x)};
}
MEDUSA_INLINE V to_float(I x) { return _mm512_cvtepi32_ps(x.v); }
MEDUSA_INLINE V widen_bytes(const uint8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
}
MEDUSA_INLINE Bytes load_bytes(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
MEDUSA_INLINE Bytes splat_quad(const uint8_t* p) { return {splat_i(p).v}; }
MEDUSA_INLINE Bytes low_nibbles(Bytes x) { return {_mm512_and_si512(x.v, _mm512_set1_epi8(15))}; }
MEDUSA_INLINE Bytes high_nibbles(Bytes x) {
  return {_mm512_and_si512(_mm512_srli_epi16(x.v, 4), _mm512_set1_epi8(15))};
}
// sum + the four products of each lane: w from 0 to 15, x from -127 to 127.
MEDUSA_INLINE I dot_small(I sum, Bytes w, Bytes x) {
  return {_mm512_dpbusd_epi32(sum.v, w.v, x.v)};
}
// sum + the products with w - 128; kDotTakesUnsigned: with w, and sum starts 128 times x less.
constexpr bool kDotTakesUnsigned = true;
MEDUSA_INLINE I dot_offset_128(I sum, Bytes w, Bytes x) { return dot_small(sum, w, x); }
// The bits of the greatest |lane|; a NaN is greater than all.
MEDUSA_INLINE uint32_t greatest_magnitude_bits(V a, V b) {
  const __m512i bits = _mm512_set1_epi32(0x7fffffff);
  const __m512i most = _mm512_max_epi32(_mm512_and_si512(_mm512_castps_si512(a), bits),
                                        _mm512_and_si512(_mm512_castps_si512(b), bits));
  return static_cast<uint32_t>(_mm512_reduce_max_epi32(most));
}
// The low byte of each lane.
MEDUSA_INLINE void store_low_bytes(int8_t* p, V x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_castps_si512(x)));
}

}  // namespace medusa::cpu::MEDUSA_ISA
