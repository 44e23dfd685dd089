// Bytes that an op must move, each counted once, and its floating-point operations: the formulas of
// the kernels' headers.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "medusa/tensor.h"

namespace medusa::bench {

struct Cost {
  int64_t num_bytes = 0, flops = 0;
};

// out [R, N] f32 = x [R, K] W^T; weight_bytes as stored.
constexpr Cost linear_cost(int64_t R, int64_t N, int64_t K, int64_t weight_bytes, DType act) {
  return {weight_bytes + R * K * dtype_bytes(act) + R * N * 4, 2 * R * N * K};
}

// seen: keys that all rows see together; cached: tokens whose K and V are read, each sequence's
// own.
constexpr Cost tree_attention_cost(int64_t R, int64_t H, int64_t Hkv, int64_t D, int64_t seen,
                                   int64_t cached, DType kv, DType act, DType out) {
  return {
      2 * cached * Hkv * D * dtype_bytes(kv) + R * H * D * (dtype_bytes(act) + dtype_bytes(out)),
      4 * seen * H * D};
}

// The logits of N nodes, read once.
constexpr Cost verify_cost(int64_t N, int64_t V) { return {N * V * 4, 0}; }

// `rows` that change their place, K and V of all layers, read and written.
constexpr Cost compact_kv_cost(int64_t L, int64_t Hkv, int64_t D, int64_t rows, DType kv) {
  return {4 * L * Hkv * D * rows * dtype_bytes(kv), 0};
}

static_assert(linear_cost(8, 4096, 4096, 4096 * 4096 * 2, DType::bf16).flops == 268435456);
static_assert(compact_kv_cost(32, 32, 128, 4, DType::bf16).num_bytes == 4 << 20);

}  // namespace medusa::bench
