// Weights in blocks as the product streams them: tiles of 32 outputs, laid end to end, all inputs
// of 32 outputs and then the next 32. Inputs come in groups of 32, which share a scale; four
// consecutive inputs of one output lie side by side, a lane of one integer product.
//
//   q8_0    64 inputs  f16 scale[2][32]                      u8 q + 128 [2][8][32][4]
//   q4_0    64 inputs  f16 scale[2][32]                      u8 [8][32][4]
//   q4_1    64 inputs  f16 scale[2][32], minimum[2][32]      u8 [8][32][4]
//   q4_k   256 inputs  f16 d[32], dmin[32],
//                      u8 scale[8][32], minimum[8][32]       u8 [4][8][32][4]
//
// A byte of the 4-bit types holds an input of an even group (low) and of the odd one behind it.
// Outputs beyond N and inputs beyond K are zero bytes: their scale is 0.
//
//   value = d q (q8_0)   d (q - 8) (q4_0)   fma(d, q, m) (q4_1)
//           fma(d scale, q, -(dmin minimum)) (q4_k)
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "backend/cpu/kernels/kernels.h"

namespace medusa::cpu {

constexpr int kGroup = 32;  // inputs of one scale
constexpr int kQuads = kGroup / 4;
constexpr int kQuadBytes = 4 * kColumns;  // of all outputs of a tile

template <DType kType>
struct BlockTile {
  static constexpr bool kNibbles = kType != DType::q8_0;
  static constexpr bool kHasMinimum = kType == DType::q4_1 || kType == DType::q4_k;
  static constexpr int kInputs = kType == DType::q4_k ? 256 : 64;
  static constexpr int kGroups = kInputs / kGroup;
  static constexpr int kScaleBytes = kType == DType::q4_k   ? 4 * kColumns + 2 * kGroups * kColumns
                                     : kType == DType::q4_1 ? 4 * kGroups * kColumns
                                                            : 2 * kGroups * kColumns;
  static constexpr int kGroupBytes = kQuads * kQuadBytes / (kNibbles ? 2 : 1);
  static constexpr int kBytes = kScaleBytes + kGroups * kGroupBytes;
  static constexpr int kShareBytes = kBytes / kGroups;  // of a group, scales included
};

// Inputs as a row of x is quantised: padded so that every type's tiles are whole.
constexpr int64_t kRowPadding = 64;

// A group of a row of x: 32 int8, a scale, and what the weight's type needs of their sum.
constexpr int64_t kXGroupBytes = kGroup + 8;

}  // namespace medusa::cpu
