// Moves inside the cache whose arguments lie on the device, for steps that no host follows.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "backend/cuda/layout.h"
#include "backend/cuda/runtime.h"

namespace medusa::cuda {

// row(len + i) = row(len + path[i]) for i in [0, n), for B lines with distinct sequences. All
// arrays are device memory.
struct DeviceMoves {
  int num_lines = 0, max_path = 0;
  const int32_t* sequence = nullptr;  // [B] line of the page table; a negative one moves nothing
  const int32_t* len = nullptr;       // [B]
  const int32_t* n = nullptr;         // [B] in [0, max_path], at n[line * n_stride]
  int n_stride = 1;
  const int32_t* path = nullptr;  // [B, max_path], strictly increasing
};

// All layers, K and V, in one launch whose grid depends on the cache's shape and B alone. Slots on
// pages that the table does not name are left alone.
void compact_kv(const CacheView& cache, const DeviceMoves& moves, cudaStream_t stream);

}  // namespace medusa::cuda
