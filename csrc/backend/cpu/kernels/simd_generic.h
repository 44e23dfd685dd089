// V for every other 64-bit platform, in the vector extension of GCC and Clang: four vectors of 128
// bits. Included by simd.h alone.
// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace medusa::cpu::MEDUSA_ISA {

typedef float F4 __attribute__((vector_size(16)));
typedef uint32_t U4 __attribute__((vector_size(16)));
typedef int32_t I4 __attribute__((vector_size(16)));
typedef uint16_t H4 __attribute__((vector_size(8)));

struct V {
  F4 a, b, c, d;
};
struct Pairs {
  V even, odd;
};
typedef int16_t S8 __attribute__((vector_size(16)));
struct I {
  I4 part[4];
};
struct Bytes {  // each four bytes of a lane as two pairs of 16 bits: 0 and 2, 1 and 3
  S8 even[4], odd[4];
};

MEDUSA_INLINE F4 splat_4(float x) { return F4{x, x, x, x}; }
MEDUSA_INLINE V splat(float x) { return {splat_4(x), splat_4(x), splat_4(x), splat_4(x)}; }
#define MEDUSA_LANEWISE(name, expression)                                    \
  MEDUSA_INLINE F4 name(F4 x, F4 y) { return expression; }                   \
  MEDUSA_INLINE V name(V x, V y) {                                           \
    return {name(x.a, y.a), name(x.b, y.b), name(x.c, y.c), name(x.d, y.d)}; \
  }
MEDUSA_LANEWISE(add, x + y)
MEDUSA_LANEWISE(sub, x - y)
MEDUSA_LANEWISE(mul, (x * y))
MEDUSA_LANEWISE(div, x / y)
MEDUSA_LANEWISE(max, x > y ? x : y)  // the second where either is NaN
MEDUSA_LANEWISE(min, x < y ? x : y)
#undef MEDUSA_LANEWISE
MEDUSA_INLINE V fma(V x, V y, V z) {
  return add(mul(x, y), z);
}  // two roundings: a fused one may be a library call
MEDUSA_INLINE V load(const float* p) {
  V x;
  __builtin_memcpy(&x, p, sizeof(x));
  return x;
}
MEDUSA_INLINE void store(float* p, V x) { __builtin_memcpy(p, &x, sizeof(x)); }

MEDUSA_INLINE U4 widen_integers(const void* p) {
  H4 x;
  __builtin_memcpy(&x, p, sizeof(x));
  return __builtin_convertvector(x, U4);
}
MEDUSA_INLINE F4 load_4(const Bf16* p) { return (F4)(widen_integers(p) << 16); }
MEDUSA_INLINE F4 load_4(const F16* p) {
  const U4 bits = widen_integers(p), rest = (bits & 0x7fffu) << 13;
  const U4 finite = (U4)((F4)rest * 0x1p112f);  // moves the exponent; exact, subnormals too
  // Infinity stays, NaN becomes quiet as the hardware makes it.
  const U4 special = rest | 0x7f800000u | ((U4)(rest > 0x0f800000u) & 0x400000u);
  return (F4)(((U4)(rest >= 0x0f800000u) ? special : finite) | (bits & 0x8000u) << 16);
}
MEDUSA_INLINE F16 narrow_f16(float x) {
  const uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000u, rest = bits & 0x7fffffffu;
  uint32_t half;
  if (rest > 0x7f800000u) {
    half = 0x7e00u | (rest >> 13 & 0x3ff);
  } else if (rest >= 0x477ff000u) {  // 65520 and more round to infinity
    half = 0x7c00u;
  } else if (rest <
             0x38800000u) {  // below 2^-14: adding 0.5 leaves the value in units of 2^-24, rounded
    half = bits_of(float_of(rest) + 0.5f) - bits_of(0.5f);
  } else {
    half = (rest - (112u << 23) + 0xfffu + (rest >> 13 & 1u)) >> 13;
  }
  return {static_cast<uint16_t>(sign | half)};
}
MEDUSA_INLINE Bf16 narrow_bf16(float x) {
  const uint32_t bits = bits_of(x);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return {
      static_cast<uint16_t>((nan ? bits | 0x400000u : bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}
MEDUSA_INLINE V load(const F16* p) {
  return {load_4(p), load_4(p + 4), load_4(p + 8), load_4(p + 12)};
}
MEDUSA_INLINE void store(F16* p, V v) {
  float x[kLanes];
  store(x, v);
  for (int i = 0; i < kLanes; ++i) p[i] = narrow_f16(x[i]);
}
MEDUSA_INLINE V load(const Bf16* p) {
  return {load_4(p), load_4(p + 4), load_4(p + 8), load_4(p + 12)};
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

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__,
              "files, caches and packed weights are little-endian");
MEDUSA_INLINE Pairs load_pairs(const Bf16* p) {
  U4 w[4], even[4], odd[4];
  __builtin_memcpy(w, p, sizeof(w));
  for (int i = 0; i < 4; ++i) {
    even[i] = w[i] << 16;
    odd[i] = w[i] & 0xffff0000u;
  }
  return {{(F4)even[0], (F4)even[1], (F4)even[2], (F4)even[3]},
          {(F4)odd[0], (F4)odd[1], (F4)odd[2], (F4)odd[3]}};
}
MEDUSA_INLINE Pairs splat_pair(const Bf16* p) {
  return {splat(float_of(static_cast<uint32_t>(p[0].bits) << 16)),
          splat(float_of(static_cast<uint32_t>(p[1].bits) << 16))};
}
MEDUSA_INLINE V dot(V sum, Pairs a, Pairs b) { return fma(a.odd, b.odd, fma(a.even, b.even, sum)); }

MEDUSA_INLINE I4 splat_i4(int32_t x) { return I4{x, x, x, x}; }
MEDUSA_INLINE I zero_i() { return {}; }
MEDUSA_INLINE I splat_i(const void* p) {
  int32_t x;
  __builtin_memcpy(&x, p, 4);
  const I4 v = splat_i4(x);
  return {{v, v, v, v}};
}
MEDUSA_INLINE V to_float(I x) {
  return {__builtin_convertvector(x.part[0], F4), __builtin_convertvector(x.part[1], F4),
          __builtin_convertvector(x.part[2], F4), __builtin_convertvector(x.part[3], F4)};
}
MEDUSA_INLINE V widen_bytes(const uint8_t* p) {
  float x[kLanes];
  for (int i = 0; i < kLanes; ++i) x[i] = p[i];
  return load(x);
}
MEDUSA_INLINE Bytes load_bytes(const uint8_t* p) {
  Bytes bytes;
  for (int i = 0; i < 4; ++i) {
    U4 words;
    __builtin_memcpy(&words, p + 16 * i, 16);
    bytes.even[i] = (S8)(words & 0x00ff00ffu);
    bytes.odd[i] = (S8)(words >> 8 & 0x00ff00ffu);
  }
  return bytes;
}
MEDUSA_INLINE Bytes splat_quad(const uint8_t* p) {  // signed, unlike load_bytes
  int8_t x[4];
  __builtin_memcpy(x, p, 4);
  Bytes bytes;
  for (int i = 0; i < 4; ++i) {
    bytes.even[i] = S8{x[0], x[2], x[0], x[2], x[0], x[2], x[0], x[2]};
    bytes.odd[i] = S8{x[1], x[3], x[1], x[3], x[1], x[3], x[1], x[3]};
  }
  return bytes;
}
MEDUSA_INLINE Bytes low_nibbles(Bytes x) {
  for (int i = 0; i < 4; ++i) {
    x.even[i] &= 15;
    x.odd[i] &= 15;
  }
  return x;
}
MEDUSA_INLINE Bytes high_nibbles(Bytes x) {
  for (int i = 0; i < 4; ++i) {
    x.even[i] >>= 4;
    x.odd[i] >>= 4;
  }
  return x;
}
MEDUSA_INLINE I4 sum_of_pairs(S8 x) { return ((I4)x << 16 >> 16) + ((I4)x >> 16); }
// sum + the four products of each lane, each of which fits 16 bits: w from 0 to 255, x from -127 to
// 127.
MEDUSA_INLINE I dot_small(I sum, Bytes w, Bytes x) {
  for (int i = 0; i < 4; ++i) {
    sum.part[i] += sum_of_pairs(w.even[i] * x.even[i]) + sum_of_pairs(w.odd[i] * x.odd[i]);
  }
  return sum;
}
// sum + the products with w - 128; kDotTakesUnsigned: with w, and sum starts 128 times x less.
constexpr bool kDotTakesUnsigned = true;
MEDUSA_INLINE I dot_offset_128(I sum, Bytes w, Bytes x) { return dot_small(sum, w, x); }
// The bits of the greatest |lane|; a NaN is greater than all.
MEDUSA_INLINE uint32_t greatest_magnitude_bits(V a, V b) {
  uint32_t most = 0;
  const V both[] = {a, b};
  for (const V& v : both) {
    float x[kLanes];
    store(x, v);
    for (const float lane : x) {
      const uint32_t bits = bits_of(lane) & 0x7fffffffu;
      most = bits > most ? bits : most;
    }
  }
  return most;
}
// The low byte of each lane.
MEDUSA_INLINE void store_low_bytes(uint8_t* p, V v) {
  float x[kLanes];
  store(x, v);
  for (int i = 0; i < kLanes; ++i) p[i] = static_cast<uint8_t>(bits_of(x[i]));
}

MEDUSA_INLINE uint32_t bits_of_lanes(U4 a, U4 b, U4 c, U4 d) {  // all or no bits of each lane set
  const U4 bit = {1, 2, 4, 8};
  const U4 some = (a & bit) | (b & bit << 4) | (c & bit << 8) | (d & bit << 12);
  return some[0] | some[1] | some[2] | some[3];
}
MEDUSA_INLINE uint32_t not_less_mask(V x, V y) {
  return bits_of_lanes((U4)(x.a >= y.a), (U4)(x.b >= y.b), (U4)(x.c >= y.c), (U4)(x.d >= y.d));
}
// One rounding on every machine, where bits matter: a library call if the machine has no such
// instruction.
MEDUSA_INLINE V fused(V x, V y, V z) {
  float a[kLanes], b[kLanes], c[kLanes];
  store(a, x);
  store(b, y);
  store(c, z);
  for (int i = 0; i < kLanes; ++i) a[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return load(a);
}

// 16 unsigned integers.
struct Words {
  U4 a, b, c, d;
};
MEDUSA_INLINE Words load_words(const uint32_t* p) {
  Words x;
  __builtin_memcpy(&x, p, sizeof(x));
  return x;
}
MEDUSA_INLINE void store_words(uint32_t* p, Words x) { __builtin_memcpy(p, &x, sizeof(x)); }
MEDUSA_INLINE Words splat_word(uint32_t x) {
  const U4 v = {x, x, x, x};
  return {v, v, v, v};
}
MEDUSA_INLINE Words xor_words(Words x, Words y) {
  return {x.a ^ y.a, x.b ^ y.b, x.c ^ y.c, x.d ^ y.d};
}
// The 64-bit products of the lanes and one factor.
MEDUSA_INLINE void wide_product(Words x, Words factor, Words& high, Words& low) {
  uint32_t lanes[kLanes], top[kLanes], bottom[kLanes];
  store_words(lanes, x);
  const uint32_t by = factor.a[0];
  for (int i = 0; i < kLanes; ++i) {
    const uint64_t product = uint64_t{lanes[i]} * by;
    top[i] = static_cast<uint32_t>(product >> 32);
    bottom[i] = static_cast<uint32_t>(product);
  }
  high = load_words(top);
  low = load_words(bottom);
}
// Each quarter of four lanes, of all four registers, is a 4 x 4 matrix.
MEDUSA_INLINE void transpose_quarters(U4& a, U4& b, U4& c, U4& d) {
  const U4 w = a, x = b, y = c, z = d;
  a = U4{w[0], x[0], y[0], z[0]};
  b = U4{w[1], x[1], y[1], z[1]};
  c = U4{w[2], x[2], y[2], z[2]};
  d = U4{w[3], x[3], y[3], z[3]};
}
MEDUSA_INLINE void transpose_quarters(Words& a, Words& b, Words& c, Words& d) {
  transpose_quarters(a.a, b.a, c.a, d.a);
  transpose_quarters(a.b, b.b, c.b, d.b);
  transpose_quarters(a.c, b.c, c.c, d.c);
  transpose_quarters(a.d, b.d, c.d, d.d);
}
MEDUSA_INLINE F4 halves(U4 x) { return __builtin_convertvector((I4)(x >> 1), F4); }
MEDUSA_INLINE V halves(Words x) {  // x / 2 without its remainder, to the nearest float
  return {halves(x.a), halves(x.b), halves(x.c), halves(x.d)};
}
MEDUSA_INLINE F4 float_of_number(F4 x) { return (F4) __builtin_convertvector(x, I4); }
MEDUSA_INLINE V float_of_number(V x) {  // the float whose bits are the integer x, 0 <= x < 2^31
  return {float_of_number(x.a), float_of_number(x.b), float_of_number(x.c), float_of_number(x.d)};
}
// To the nearest integers, ties to even; 0 <= x < 2^51.
MEDUSA_INLINE void store_integers(uint64_t* p, V v) {
  float x[kLanes];
  store(x, v);
  for (int i = 0; i < kLanes; ++i) {
    const double sum = x[i] + 0x1p52;  // leaves the integer in the low bits
    uint64_t bits;
    __builtin_memcpy(&bits, &sum, sizeof(bits));
    p[i] = bits & 0xfffffffffffffu;
  }
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
