// The inner loop of every product: M rows of x against C vectors of 16 outputs, a lane each.
//
//   sum[m][c] lane j  +=  sum over k of  w[k][16 c + j] * x[m][k],   k rising one by one
//
// The order of the sum of one (row, output) is that of its lane, so it cannot depend on M, on C or
// on what the other rows and lanes hold. bf16 takes k in pairs: one vdpbf16ps, elsewhere the even
// product and then the odd one.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "backend/cpu/kernels/simd.h"

namespace medusa::cpu::MEDUSA_ISA {

template <class W>
struct Operand {  // f32 and f16 weights, widened; x is f32
  using X = float;
  static constexpr int kStep = 1;  // k per iteration
  MEDUSA_INLINE V load_w(const W* p) { return load(p); }
  MEDUSA_INLINE V load_x(const X* p) { return splat(*p); }
  MEDUSA_INLINE V multiply_add(V sum, V w, V x) { return fma(w, x, sum); }
};

template <>
struct Operand<Bf16> {
  using X = Bf16;
  static constexpr int kStep = 2;
  MEDUSA_INLINE Pairs load_w(const Bf16* p) { return load_pairs(p); }
  MEDUSA_INLINE Pairs load_x(const Bf16* p) { return splat_pair(p); }
  MEDUSA_INLINE V multiply_add(V sum, Pairs w, Pairs x) { return dot(sum, w, x); }
};

// What is asked for meanwhile: kLines cache lines at `at` in each step, which moves by `step`
// bytes; after `turn` steps it goes on at `next`. They go to the second-level cache: it has more
// requests in flight than the first, and room for a block.
struct Fetch {
  const char* at;
  int64_t step;
  int64_t turn = INT64_MAX;
  const char* next = nullptr;
};

// w_step in elements. x is [K / kStep][M][kStep], so that one pointer serves all rows.
template <class W, int M, int C, int kLines = C>
MEDUSA_INLINE void dot_block(const W* w, int64_t w_step, const typename Operand<W>::X* x,
                             int64_t num_k, V (&sum)[M][C], Fetch fetch) {
  using Op = Operand<W>;
  using Wide = decltype(Op::load_w(w));
  constexpr int kVector = kLanes * Op::kStep;
  for (int m = 0; m < M; ++m) {
    for (int c = 0; c < C; ++c) sum[m][c] = zero();
  }
  for (int64_t k = 0; k < num_k;
       k += Op::kStep, w += w_step, x += M * Op::kStep, fetch.at += fetch.step) {
    if (fetch.turn-- == 0) fetch.at = fetch.next;
    Wide wide[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      wide[c] = Op::load_w(w + c * kVector);
      if (c < kLines) __builtin_prefetch(fetch.at + c * 64, 0, 2);
    }
#pragma GCC unroll 32
    for (int m = 0; m < M; ++m) {
      const Wide value = Op::load_x(x + m * Op::kStep);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) sum[m][c] = Op::multiply_add(sum[m][c], wide[c], value);
    }
  }
}

// Lays [first_k, last_k) of rows of x out as dot_block wants them; row_of(m) points to row m.
template <class X, int kStep, class RowOf>
MEDUSA_INLINE void interleave(RowOf row_of, int num_rows, int64_t first_k, int64_t last_k, X* out) {
  for (int m = 0; m < num_rows; ++m) {
    const auto* row = static_cast<const X*>(row_of(m));
    X* to = out + first_k * num_rows + m * kStep;
    for (int64_t k = first_k; k < last_k; k += kStep, to += num_rows * kStep) {
      __builtin_memcpy(to, row + k, kStep * sizeof(X));
    }
  }
}

}  // namespace medusa::cpu::MEDUSA_ISA
