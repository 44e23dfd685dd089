// The random numbers and the three functions (exp, log, Gumbel noise) that decide a token. Every
// backend computes them from this file, in f32 with explicit fma, so that CPU and CUDA agree bit
// for bit. Host and device code, no state.
//
// Philox4x32-10   counter (vocab_id / 4, position, sample_index, 0), key (seed low, seed high),
//                 word vocab_id % 4
//                 Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011
// log             polynomial on [sqrt(1/2), sqrt(2)), 7e-10 relative before rounding;
//                 own minimax fits
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define MEDUSA_HD __host__ __device__
#else
#define MEDUSA_HD
#endif

namespace medusa {

struct Philox4 {
  uint32_t word[4];
};

MEDUSA_HD inline Philox4 philox4x32(Philox4 counter, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * counter.word[0];
    const uint64_t p1 = uint64_t{0xCD9E8D57u} * counter.word[2];
    counter = {{static_cast<uint32_t>(p1 >> 32) ^ counter.word[1] ^ key0, static_cast<uint32_t>(p1),
                static_cast<uint32_t>(p0 >> 32) ^ counter.word[3] ^ key1,
                static_cast<uint32_t>(p0)}};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return counter;
}

// The words of the four vocabulary ids 4 * block .. 4 * block + 3, for the token to be emitted at
// this absolute position.
MEDUSA_HD inline Philox4 noise_words(uint64_t seed, uint32_t sample_index, uint32_t position,
                                     uint32_t block) {
  return philox4x32({{block, position, sample_index, 0u}}, static_cast<uint32_t>(seed),
                    static_cast<uint32_t>(seed >> 32));
}

MEDUSA_HD inline uint32_t noise_word(uint64_t seed, uint32_t sample_index, uint32_t position,
                                     uint32_t vocab_id) {
  return noise_words(seed, sample_index, position, vocab_id / 4).word[vocab_id % 4];
}

namespace noise_detail {

MEDUSA_HD inline uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}

MEDUSA_HD inline float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

// log(1 + f) for f in [sqrt(1/2) - 1, sqrt(2) - 1]
MEDUSA_HD inline float log1p_reduced(float f) {
  float p = 0.06915546f;
  p = fmaf(p, f, -0.11789866f);
  p = fmaf(p, f, 0.11872924f);
  p = fmaf(p, f, -0.12384335f);
  p = fmaf(p, f, 0.14218664f);
  p = fmaf(p, f, -0.16669253f);
  p = fmaf(p, f, 0.20002227f);
  p = fmaf(p, f, -0.24999987f);
  p = fmaf(p, f, 0.3333331f);
  const float f2 = f * f;
  return fmaf(f2 * f, p, fmaf(-0.5f, f2, f));
}

}  // namespace noise_detail

// Natural logarithm of a positive normal f32.
MEDUSA_HD inline float log_f32(float x) {
  // The exponent that leaves a mantissa in [sqrt(1/2), sqrt(2)).
  const uint32_t bits = noise_detail::bits_of(x);
  const int32_t exponent = static_cast<int32_t>(bits - 0x3F3504F3u) >> 23;
  const float mantissa = noise_detail::float_of(bits - (static_cast<uint32_t>(exponent) << 23));
  const float n = static_cast<float>(exponent);
  // ln 2 in two parts: the first has trailing zeros, so that n times it is exact.
  const float low = fmaf(n, 1.42860677e-6f, noise_detail::log1p_reduced(mantissa - 1.0f));
  return fmaf(n, 0.693145752f, low);
}

// Gumbel noise of a 32-bit word: u = (x + 0.5) / 2^32, E = -log(1 - u), G = -log E. Falls with x;
// between -3.14 and 22.88.
MEDUSA_HD inline float gumbel_from_bits(uint32_t x) {
  constexpr float kUnit = 2.3283064365386963e-10f;  // 2^-32
  float e;
  if (x < 0x80000000u) {
    const float u = (static_cast<float>(x) + 0.5f) * kUnit;
    // log1p directly where 1 - u would lose u's low bits.
    e = u < 0.29f ? -noise_detail::log1p_reduced(-u) : -log_f32(1.0f - u);
  } else {
    // 1 - u formed from the integer: in f32, u rounds to 1 for the largest x.
    e = -log_f32((static_cast<float>(0xFFFFFFFFu - x) + 0.5f) * kUnit);
  }
  return -log_f32(e);
}

constexpr float kMaxGumbel = 22.89f;  // no word gives more

// exp(x) for x <= 0; 0 below -87.
MEDUSA_HD inline float exp_f32(float x) {
  if (!(x > -87.0f)) return 0.0f;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float n = fmaf(x, 1.44269504f, kRound) - kRound;
  float r = fmaf(n, -0.693145752f, x);
  r = fmaf(n, -1.42860677e-6f, r);
  float p = 0.001395048f;
  p = fmaf(p, r, 0.008368882f);
  p = fmaf(p, r, 0.041666206f);
  p = fmaf(p, r, 0.1666652f);
  p = fmaf(p, r, 0.5f);
  const float y = fmaf(r * r, p, r) + 1.0f;
  return noise_detail::float_of(noise_detail::bits_of(y) +
                                (static_cast<uint32_t>(static_cast<int32_t>(n)) << 23));
}

}  // namespace medusa
