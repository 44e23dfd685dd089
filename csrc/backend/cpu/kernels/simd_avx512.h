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
MEDUSA_INLINE __m256 low_half(V x) { return _mm512_castps512_ps256(x); }
MEDUSA_INLINE __m256 high_half(V x) { return _mm512_extractf32x8_ps(x, 1); }
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
MEDUSA_INLINE void store_low_bytes(uint8_t* p, V x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_castps_si512(x)));
}

MEDUSA_INLINE uint32_t not_less_mask(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
MEDUSA_INLINE V fused(V a, V b, V c) { return fma(a, b, c); }  // one rounding on every machine

// 16 unsigned integers.
using Words = __m512i;
MEDUSA_INLINE Words splat_word(uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
MEDUSA_INLINE Words load_words(const uint32_t* p) { return _mm512_loadu_si512(p); }
MEDUSA_INLINE void store_words(uint32_t* p, Words x) { _mm512_storeu_si512(p, x); }
MEDUSA_INLINE Words xor_words(Words a, Words b) { return _mm512_xor_si512(a, b); }
// The 64-bit products of the lanes and one factor.
MEDUSA_INLINE void wide_product(Words x, Words factor, Words& high, Words& low) {
  const __m512i even = _mm512_mul_epu32(x, factor);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), factor);
  high = _mm512_mask_shuffle_epi32(odd, 0x5555, even, _MM_PERM_CDAB);
  low = _mm512_mask_shuffle_epi32(even, 0xAAAA, odd, _MM_PERM_CDAB);
}
// Each quarter of four lanes, of all four registers, is a 4 x 4 matrix.
MEDUSA_INLINE void transpose_quarters(Words& a, Words& b, Words& c, Words& d) {
  const __m512i ab = _mm512_unpacklo_epi32(a, b), cd = _mm512_unpacklo_epi32(c, d);
  const __m512i ab_high = _mm512_unpackhi_epi32(a, b), cd_high = _mm512_unpackhi_epi32(c, d);
  a = _mm512_unpacklo_epi64(ab, cd);
  b = _mm512_unpackhi_epi64(ab, cd);
  c = _mm512_unpacklo_epi64(ab_high, cd_high);
  d = _mm512_unpackhi_epi64(ab_high, cd_high);
}
MEDUSA_INLINE V halves(Words x) {  // x / 2 without its remainder, to the nearest float
  return _mm512_cvtepi32_ps(_mm512_srli_epi32(x, 1));
}
MEDUSA_INLINE V float_of_number(V x) {  // the float whose bits are the integer x, |x| < 2^31
  return _mm512_castsi512_ps(_mm512_cvtps_epi32(x));
}
// To the nearest integers, ties to even; 0 <= x < 2^51.
MEDUSA_INLINE void store_integers(uint64_t* p, V x) {
  _mm512_storeu_si512(p, _mm512_cvtps_epi64(_mm512_castps512_ps256(x)));
  _mm512_storeu_si512(p + 8, _mm512_cvtps_epi64(_mm512_extractf32x8_ps(x, 1)));
}
// The lanes of the mask in their order and their numbers, from `first` on; all 16 places may be
// written.
MEDUSA_INLINE void store_chosen(float* p, int32_t* numbers, V x, int32_t first, uint32_t mask) {
  const auto lanes = static_cast<__mmask16>(mask);
  const __m512i ids =
      _mm512_add_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                       _mm512_set1_epi32(first));
  _mm512_storeu_ps(p, _mm512_maskz_compress_ps(lanes, x));
  _mm512_storeu_si512(numbers, _mm512_maskz_compress_epi32(lanes, ids));
}

}  // namespace medusa::cpu::MEDUSA_ISA
