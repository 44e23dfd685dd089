// Where an element lies in a packed weight and in a block of the cache. The kernels rely on these;
// see kernels/linear.cpp and kernels/attention.cpp.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "backend/cpu/kernels/kernels.h"
#include "medusa/backend.h"

namespace medusa::cpu {

// Consecutive k that lie side by side, [K / pair][columns][pair]: what one bf16 product instruction
// takes.
constexpr int64_t pair_of(DType dtype) { return dtype == DType::bf16 ? 2 : 1; }

// Element (k, column) of a [K / pair][num_columns][pair] block.
constexpr int64_t packed_index(int64_t k, int64_t column, int64_t num_columns, int64_t pair) {
  return (k / pair * num_columns + column) * pair + k % pair;
}

static_assert(kPage == kPageTokens && kMaxAncestorWords == kAncestorWords);

// First byte of the block of one (layer, K or V, page, kv head).
inline char* cache_block(const KvCache& cache, int64_t layer, int64_t kv, int64_t page,
                         int64_t head) {
  const KvShape& shape = cache.shape;
  const int64_t block = ((layer * 2 + kv) * shape.num_pages + page) * shape.num_kv_heads + head;
  return static_cast<char*>(cache.buffer->data()) +
         block * kPage * shape.head_dim * dtype_bytes(shape.dtype);
}

}  // namespace medusa::cpu
