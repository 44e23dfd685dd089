// V, I and Bytes for AVX2: two registers; Pairs are widened to even and odd halves. Included by
// simd.h alone.
// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace medusa::cpu::MEDUSA_ISA {

struct V {
  __m256 a, b;
};
struct Pairs {
  V even, odd;
};
struct I {
  __m256i a, b;
};
struct Bytes {
  __m256i a, b;
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
MEDUSA_INLINE __m256 low_half(V x) { return x.a; }
MEDUSA_INLINE __m256 high_half(V x) { return x.b; }
MEDUSA_INLINE V load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
MEDUSA_INLINE void store(float* p, V x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
MEDUSA_INLINE __m128i load_128(const void* p) {
  return _mm_loadu_si128(static_cast<const __m128i*>(p));
}
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
  const __m256i chosen =
      _mm256_srli_epi32(_mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(rounded),
                                                             _mm256_castsi256_ps(quiet), nan)),
                        16);
  return _mm_packus_epi32(_mm256_castsi256_si128(chosen), _mm256_extracti128_si256(chosen, 1));
}
MEDUSA_INLINE void store(Bf16* p, V x) {
  store_128(p, narrow(x.a));
  store_128(p + 8, narrow(x.b));
}
MEDUSA_INLINE __m256 pow2_of_shifted(__m256 t) {
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_slli_epi32(_mm256_castps_si256(t), 23),
                                              _mm256_set1_epi32(0x3f800000)));
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

MEDUSA_INLINE __m256 even_of(__m256i pairs) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
}
MEDUSA_INLINE __m256 odd_of(__m256i pairs) {
  return _mm256_castsi256_ps(
      _mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
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

MEDUSA_INLINE I zero_i() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
MEDUSA_INLINE I splat_i(const void* p) {
  int32_t x;
  __builtin_memcpy(&x, p, 4);
  const __m256i v = _mm256_set1_epi32(x);
  return {v, v};
}
MEDUSA_INLINE V to_float(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
MEDUSA_INLINE V widen_bytes(const uint8_t* p) {
  const __m128i bytes = load_128(p);
  return to_float({_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8))});
}
MEDUSA_INLINE Bytes load_bytes(const uint8_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32))};
}
MEDUSA_INLINE Bytes splat_quad(const uint8_t* p) {
  const I x = splat_i(p);
  return {x.a, x.b};
}
MEDUSA_INLINE Bytes low_nibbles(Bytes x) {
  const __m256i mask = _mm256_set1_epi8(15);
  return {_mm256_and_si256(x.a, mask), _mm256_and_si256(x.b, mask)};
}
MEDUSA_INLINE Bytes high_nibbles(Bytes x) {
  return low_nibbles({_mm256_srli_epi16(x.a, 4), _mm256_srli_epi16(x.b, 4)});
}
// The products fit 16 bits two by two: at most 2 * 128 * 127.
MEDUSA_INLINE __m256i add_products(__m256i sum, __m256i magnitude, __m256i x) {
  const __m256i twos = _mm256_maddubs_epi16(magnitude, x);
  return _mm256_add_epi32(sum, _mm256_madd_epi16(twos, _mm256_set1_epi16(1)));
}
// sum + the four products of each lane: w from 0 to 15, x from -127 to 127.
MEDUSA_INLINE I dot_small(I sum, Bytes w, Bytes x) {
  return {add_products(sum.a, w.a, x.a), add_products(sum.b, w.b, x.b)};
}
MEDUSA_INLINE __m256i add_signed(__m256i sum, __m256i w, __m256i x) {
  w = _mm256_xor_si256(w, _mm256_set1_epi8(-128));
  return add_products(sum, _mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
}
// sum + the products with w - 128; kDotTakesUnsigned: with w, and sum starts 128 times x less.
constexpr bool kDotTakesUnsigned = false;
MEDUSA_INLINE I dot_offset_128(I sum, Bytes w, Bytes x) {
  return {add_signed(sum.a, w.a, x.a), add_signed(sum.b, w.b, x.b)};
}
// The bits of the greatest |lane|; a NaN is greater than all.
MEDUSA_INLINE uint32_t greatest_magnitude_bits(V a, V b) {
  const __m256 bits = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  const auto magnitude = [&](__m256 x) { return _mm256_castps_si256(_mm256_and_ps(x, bits)); };
  const __m256i most = _mm256_max_epi32(_mm256_max_epi32(magnitude(a.a), magnitude(a.b)),
                                        _mm256_max_epi32(magnitude(b.a), magnitude(b.b)));
  __m128i four = _mm_max_epi32(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
  four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0xb1));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(four));
}
// The low byte of each lane.
MEDUSA_INLINE void store_low_bytes(uint8_t* p, V x) {
  const __m256i low = _mm256_set1_epi32(255);
  const __m256i a = _mm256_and_si256(_mm256_castps_si256(x.a), low);
  const __m256i b = _mm256_and_si256(_mm256_castps_si256(x.b), low);
  const __m128i first = _mm_packus_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  const __m128i second =
      _mm_packus_epi32(_mm256_castsi256_si128(b), _mm256_extracti128_si256(b, 1));
  store_128(p, _mm_packus_epi16(first, second));
}

MEDUSA_INLINE uint32_t not_less_mask(V x, V y) {
  const int low = _mm256_movemask_ps(_mm256_cmp_ps(x.a, y.a, _CMP_GE_OQ));
  const int high = _mm256_movemask_ps(_mm256_cmp_ps(x.b, y.b, _CMP_GE_OQ));
  return static_cast<uint32_t>(low | high << 8);
}
MEDUSA_INLINE V fused(V x, V y, V z) { return fma(x, y, z); }  // one rounding on every machine

// 16 unsigned integers.
struct Words {
  __m256i a, b;
};
MEDUSA_INLINE Words splat_word(uint32_t x) {
  const __m256i v = _mm256_set1_epi32(static_cast<int>(x));
  return {v, v};
}
MEDUSA_INLINE Words load_words(const uint32_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 8))};
}
MEDUSA_INLINE void store_words(uint32_t* p, Words x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x.a);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 8), x.b);
}
MEDUSA_INLINE Words xor_words(Words x, Words y) {
  return {_mm256_xor_si256(x.a, y.a), _mm256_xor_si256(x.b, y.b)};
}
MEDUSA_INLINE void wide_product(__m256i x, __m256i factor, __m256i& high, __m256i& low) {
  const __m256i even = _mm256_mul_epu32(x, factor);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), factor);
  high = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
  low = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
}
// The 64-bit products of the lanes and one factor.
MEDUSA_INLINE void wide_product(Words x, Words factor, Words& high, Words& low) {
  wide_product(x.a, factor.a, high.a, low.a);
  wide_product(x.b, factor.b, high.b, low.b);
}
MEDUSA_INLINE void transpose_quarters(__m256i& a, __m256i& b, __m256i& c, __m256i& d) {
  const __m256i ab = _mm256_unpacklo_epi32(a, b), cd = _mm256_unpacklo_epi32(c, d);
  const __m256i ab_high = _mm256_unpackhi_epi32(a, b), cd_high = _mm256_unpackhi_epi32(c, d);
  a = _mm256_unpacklo_epi64(ab, cd);
  b = _mm256_unpackhi_epi64(ab, cd);
  c = _mm256_unpacklo_epi64(ab_high, cd_high);
  d = _mm256_unpackhi_epi64(ab_high, cd_high);
}
// Each quarter of four lanes, of all four registers, is a 4 x 4 matrix.
MEDUSA_INLINE void transpose_quarters(Words& a, Words& b, Words& c, Words& d) {
  transpose_quarters(a.a, b.a, c.a, d.a);
  transpose_quarters(a.b, b.b, c.b, d.b);
}
MEDUSA_INLINE V halves(Words x) {  // x / 2 without its remainder, to the nearest float
  return {_mm256_cvtepi32_ps(_mm256_srli_epi32(x.a, 1)),
          _mm256_cvtepi32_ps(_mm256_srli_epi32(x.b, 1))};
}
MEDUSA_INLINE V float_of_number(V x) {  // the float whose bits are the integer x, |x| < 2^31
  return {_mm256_castsi256_ps(_mm256_cvtps_epi32(x.a)),
          _mm256_castsi256_ps(_mm256_cvtps_epi32(x.b))};
}
MEDUSA_INLINE void store_integers(uint64_t* p, __m128 x) {
  // Adding 2^52 leaves the integer in the low bits.
  const __m256d shift = _mm256_set1_pd(0x1p52);
  const __m256d sum = _mm256_add_pd(_mm256_cvtps_pd(x), shift);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm256_xor_si256(_mm256_castpd_si256(sum), _mm256_castpd_si256(shift)));
}
// To the nearest integers, ties to even; 0 <= x < 2^51.
MEDUSA_INLINE void store_integers(uint64_t* p, V x) {
  store_integers(p, _mm256_castps256_ps128(x.a));
  store_integers(p + 4, _mm256_extractf128_ps(x.a, 1));
  store_integers(p + 8, _mm256_castps256_ps128(x.b));
  store_integers(p + 12, _mm256_extractf128_ps(x.b, 1));
}
// The lanes of the mask in their order and their numbers, from `first` on; all 16 places may be
// written.
MEDUSA_INLINE void store_chosen(float* p, int32_t* numbers, V v, int32_t first, uint32_t mask) {
  float x[kLanes];
  store(x, v);
  for (; mask != 0; mask &= mask - 1) {
    const int lane = __builtin_ctz(mask);
    *p++ = x[lane];
    *numbers++ = first + lane;
  }
}

}  // namespace medusa::cpu::MEDUSA_ISA
