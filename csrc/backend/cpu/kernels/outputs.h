// The end of every product: sums of a tile of rows to the output.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "backend/cpu/kernels/kernels.h"
#include "backend/cpu/kernels/simd.h"

namespace medusa::cpu::MEDUSA_ISA {

// out[first_row + m][first_output + 16 c + lane] = (accumulate ? out : 0) + (sum + bias), but for
// outputs beyond N.
template <int M, int C>
MEDUSA_INLINE void store_outputs(const LinearTask& task, V (&sum)[M][C], int64_t first_row,
                                 int64_t first_output) {
  for (int c = 0; c < C; ++c) {
    const int64_t output = first_output + c * kLanes;
    const int64_t valid = task.num_outputs - output;
    if (valid <= 0) break;
    const V bias = task.bias != nullptr ? load_some(task.bias + output, valid) : zero();
    for (int m = 0; m < M; ++m) {
      float* out = task.out + (first_row + m) * task.num_outputs + output;
      V value = add(sum[m][c], bias);
      if (task.accumulate) value = add(load_some(out, valid), value);
      store_some(out, value, valid);
    }
  }
}

}  // namespace medusa::cpu::MEDUSA_ISA
