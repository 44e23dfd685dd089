// Warps, and sums over a warp or a block in one fixed order, so that the bits depend on the addends
// alone.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "backend/cuda/gpu.h"

namespace medusa::cuda {

constexpr int kWarp = 32;
constexpr uint32_t kAllLanes = 0xFFFFFFFFu;

// Every lane gets the sum: in each round both lanes of a pair add the same two numbers.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

// Every thread gets the sum. blockDim.x is a multiple of 32; `partial` [32] is shared memory that
// nothing else uses before the block's next barrier.
__device__ __forceinline__ float block_sum(float x, float* partial) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int num_warps = static_cast<int>(blockDim.x) / kWarp;
  x = warp_sum(x);
  if (lane == 0) partial[warp] = x;
  __syncthreads();
  return warp_sum(lane < num_warps ? partial[lane] : 0.0f);
}

}  // namespace medusa::cuda
