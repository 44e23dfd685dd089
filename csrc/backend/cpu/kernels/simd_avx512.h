// V and Pairs for AVX-512 with BF16: one register each. Included by simd.h alone.
// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace medusa::cpu::MEDUSA_ISA {

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

}  // namespace medusa::cpu::MEDUSA_ISA
