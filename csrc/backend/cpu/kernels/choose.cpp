// choose: what the choice of a token reads whole rows for.
//
//   greatest     argmax of a row
//   noisy_block  the next 64 ids of which one could win: score + noise >= the best so far
//   gather       ids whose score is not below a floor, and their scores
//   masses       round(2^32 exp(score - greatest)), the integers that top-p sums; total_mass: of
//   all
//
// A score is logit / temperature, one f32 division. Noise is Philox4x32-10 of noise.h, four ids a
// counter: lane 4 L + r of the 16 counters holds the ids of block 4 r + L, so that a transposition
// within quarters leaves the words of 64 ids in their order.
//
// Bound     An id wins only if score + G >= best. G = -log E and E >= u = (word + 0.5) / 2^32, so
//           only if u <= e^(score - best): no logarithm for the others. 2^t <= (1 + frac t) 2^floor
//           t, which is the float whose exponent and mantissa bits hold t; 6 % too much at most.
//           The slack holds the roundings of both sides, and of score + G itself, which are a share
//           of |best|. What is offered is a superset; the caller decides by the exact noise.
// Traffic   4 n bytes a call to greatest and gather; noisy_block goes over the row once in all
// SPDX-License-Identifier: Apache-2.0
#include "backend/cpu/kernels/kernels.h"
#include "backend/cpu/kernels/simd.h"

namespace medusa::cpu::MEDUSA_ISA {
namespace {

constexpr int kQuads = 16;  // counters a turn, of four ids each

MEDUSA_INLINE float magnitude(float x) { return x < 0 ? -x : x; }

// Words of the ids 64 * turn .. 64 * turn + 63.
MEDUSA_INLINE void noise_words(const NoisyRow& row, int64_t turn, Words (&words)[4]) {
  uint32_t quads[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    quads[i] = static_cast<uint32_t>(turn * kQuads + i % 4 * 4 + i / 4);
  }
  Words c0 = load_words(quads), c1 = splat_word(row.position), c2 = splat_word(row.sample_index),
        c3 = splat_word(0);
  auto key0 = static_cast<uint32_t>(row.seed), key1 = static_cast<uint32_t>(row.seed >> 32);
  const Words factor0 = splat_word(0xD2511F53u), factor1 = splat_word(0xCD9E8D57u);
  for (int round = 0; round < 10; ++round) {
    Words high0, low0, high1, low1;
    wide_product(c0, factor0, high0, low0);
    wide_product(c2, factor1, high1, low1);
    c0 = xor_words(xor_words(high1, c1), splat_word(key0));
    c1 = low1;
    c2 = xor_words(xor_words(high0, c3), splat_word(key1));
    c3 = low0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  transpose_quarters(c0, c1, c2, c3);
  words[0] = c0;
  words[1] = c1;
  words[2] = c2;
  words[3] = c3;
}

// 2^32 exp(score - greatest), not yet rounded: exp_f32 of noise.h, but below -80, where the integer
// is 0 long since. NaN has no mass.
MEDUSA_INLINE V mass_of(V score, V greatest) {
  const V shift = splat(12582912.0f);  // 1.5 * 2^23
  const V x = max(sub(score, greatest), splat(-80.0f));
  const V shifted = fused(x, splat(1.44269504f), shift);
  const V n = sub(shifted, shift);
  V r = fused(n, splat(-0.693145752f), x);
  r = fused(n, splat(-1.42860677e-6f), r);
  V p = splat(0.001395048f);
  p = fused(p, r, splat(0.008368882f));
  p = fused(p, r, splat(0.041666206f));
  p = fused(p, r, splat(0.1666652f));
  p = fused(p, r, splat(0.5f));
  const V y = add(fused(mul(r, r), p, r), splat(1.0f));
  return mul(mul(y, pow2_of_shifted(shifted)), splat(4294967296.0f));
}

}  // namespace

// Lowest id of the greatest value; NaN never wins; 0 where nothing is above -infinity.
int64_t greatest(const float* values, int64_t n) {
  constexpr int64_t kPart = 2048;  // read twice, if it holds the greatest
  const float lowest = -__builtin_inff();
  float best = lowest;
  int64_t part = 0;
  for (int64_t start = 0; start < n; start += kPart) {
    const int64_t end = start + kPart < n ? start + kPart : n;
    V top[4] = {splat(lowest), splat(lowest), splat(lowest), splat(lowest)};
    int64_t i = start;
    for (; i + 4 * kLanes <= end; i += 4 * kLanes) {
      for (int j = 0; j < 4; ++j) top[j] = max(load(values + i + j * kLanes), top[j]);
    }
    for (; i < end; i += kLanes) top[0] = max(load_some(values + i, end - i, lowest), top[0]);
    const float top_of_part = max_of(max(max(top[0], top[1]), max(top[2], top[3])));
    if (top_of_part > best) {
      best = top_of_part;
      part = start;
    }
  }
  if (best == lowest) return 0;
  while (values[part] != best) ++part;
  return part;
}

// The first block from `start` on, a multiple of 64, that holds an id which could reach `best`;
// block.first >= row.n if there is none.
void noisy_block(const NoisyRow& row, int64_t start, float best, NoisyBlock& block) {
  constexpr float kPerUnit = 1.44269504f * 8388608.0f;  // bits of a float to a factor of e
  constexpr float kTop = 1.4e9f;                        // the bits of a float above 2^31
  // Scores below it cannot win with the greatest noise, or are filtered out.
  const float reach = best - (kGreatestNoise + magnitude(best) * 0x1p-22f);
  const V lowest = splat(reach > row.floor ? reach : row.floor);
  // e^(score - best) in units of the halved words, 2^31 of them, with the slack. The slack of a
  // |best| beyond all noise overflows to infinity, and all within reach are possible.
  const V temperature = splat(row.temperature), best_score = splat(best);
  const V per_unit = splat(kPerUnit);
  const V offset = splat((127.0f + 31.0f + 1e-3f + magnitude(best) * 0x1p-21f) * 8388608.0f);

  for (int64_t first = start; first < row.n; first += NoisyBlock::kIds) {
    V scores[4];
    uint64_t within = 0;
    for (int i = 0; i < 4; ++i) {
      const int64_t at = first + i * kLanes;
      const V logits = at + kLanes <= row.n ? load(row.logits + at)
                       : at < row.n ? load_some(row.logits + at, row.n - at, -__builtin_inff())
                                    : splat(-__builtin_inff());
      scores[i] = div(logits, temperature);
      within |= uint64_t{not_less_mask(scores[i], lowest)} << (i * kLanes);
    }
    if (row.n - first < NoisyBlock::kIds) within &= (uint64_t{1} << (row.n - first)) - 1;
    if (within == 0) continue;

    Words words[4];
    noise_words(row, first / NoisyBlock::kIds, words);
    uint64_t possible = 0;
    for (int i = 0; i < 4; ++i) {
      const V bits = fma(sub(scores[i], best_score), per_unit, offset);
      const V limit = float_of_number(min(max(bits, zero()), splat(kTop)));
      possible |= uint64_t{not_less_mask(limit, halves(words[i]))} << (i * kLanes);
    }
    possible &= within;
    if (possible == 0) continue;
    for (int i = 0; i < 4; ++i) store_words(block.words + i * kLanes, words[i]);
    block.possible = possible;
    block.first = first;
    return;
  }
  block.first = row.n;
}

int64_t gather(const float* logits, int64_t n, float temperature, float floor, int32_t* ids,
               float* scores) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; i += kLanes) {
    const V score = div(load_some(logits + i, n - i, -__builtin_inff()), splat(temperature));
    uint32_t mask = not_less_mask(score, splat(floor));
    if (n - i < kLanes) mask &= (1u << (n - i)) - 1;
    store_chosen(scores + count, ids + count, score, static_cast<int32_t>(i), mask);
    count += __builtin_popcount(mask);
  }
  return count;
}

void masses(const float* scores, int64_t n, float greatest, uint64_t* out) {
  for (int64_t i = 0; i < n; i += kLanes) {
    uint64_t lanes[kLanes];
    const bool whole = n - i >= kLanes;
    store_integers(whole ? out + i : lanes, mass_of(load_some(scores + i, n - i), splat(greatest)));
    if (!whole) __builtin_memcpy(out + i, lanes, static_cast<size_t>(n - i) * sizeof(uint64_t));
  }
}

uint64_t total_mass(const float* logits, int64_t n, float temperature, float greatest) {
  const V without = splat(greatest - kMassRange);
  uint64_t sums[kLanes] = {};
  for (int64_t i = 0; i < n; i += kLanes) {
    const V score = div(load_some(logits + i, n - i, -__builtin_inff()), splat(temperature));
    if (not_less_mask(score, without) == 0) continue;
    uint64_t lanes[kLanes];
    store_integers(lanes, mass_of(score, splat(greatest)));
    for (int lane = 0; lane < kLanes; ++lane) sums[lane] += lanes[lane];
  }
  uint64_t total = 0;
  for (const uint64_t sum : sums) total += sum;
  return total;
}

}  // namespace medusa::cpu::MEDUSA_ISA
