// Rows of weights in blocks: as GGUF holds them, and in the tiles of kernels/block_layout.h.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "backend/cpu/kernels/kernels.h"
#include "medusa/tensor.h"

namespace medusa::cpu {

// Bytes of the tiles of 32 outputs.
int64_t tiles_bytes(DType dtype, int64_t num_inputs);

// One row of blocks to one of the 32 columns of its tiles, unchanged; false where a scale or
// minimum is no finite number.
bool place_row(DType dtype, const uint8_t* blocks, int64_t num_inputs, uint8_t* tiles, int column);

// The values of one column.
void read_row(const Kernels& kernels, DType dtype, const uint8_t* tiles, int64_t num_inputs,
              int column, float* out);

// Blocks of a row, as GGUF defines them:
//   q8_0   d = max|x| / 127, q = round(x / d), halves away from zero
//   q4_0   d = x of the greatest |x| / -8, q = floor(x / d + 8.5), at most 15
//   q4_1   m = min x, d = (max x - m) / 15, q = floor((x - m) / d + 0.5), at most 15
// d and m are f16; q is computed with d in f32 before it is rounded. A group with a value that is
// no finite number gets a scale that is none.
void quantise_row(const Kernels& kernels, DType dtype, const float* x, int64_t num_inputs,
                  uint8_t* blocks);

}  // namespace medusa::cpu
