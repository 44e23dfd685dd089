// Where an element lies in a packed weight, and the one order in which a product sums over K; host
// and device.
//
// 16-bit weights lie as the A operand of mma.m16n8k16, so that the product streams them without a
// barrier or a bank conflict: [strip of 16 outputs][block of 64 inputs][step of 16][lane][8], the 8
// elements of a lane being its registers a0..a3. A strip's blocks of 2 KiB are contiguous over K;
// any number of strips makes a tile, so the layout knows neither tile nor split. N is padded to 16,
// K to 64, with zeros.
// f32 weights lie as [tile of 32 outputs][K][32]; outputs are padded with zeros.
//
// Order     K is cut into blocks of 64 inputs and these into num_splits(N, K) splits, split s being
//           blocks [split_begin(s), split_begin(s + 1)). Within a split, mma steps of 16 inputs
//           ascend into one f32 accumulator that starts at 0. The splits' sums are added to 0 in
//           ascending order, then the bias, then the residual. Nothing here knows rows, tiles or
//           the device: every (row, output) is summed alike, alone or in any batch.
//           f32: fmaf over ascending inputs into one accumulator from 0, then bias, residual.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "backend/cuda/runtime.h"
#include "medusa/backend.h"
#include "medusa/noise.h"

namespace medusa::cuda {

constexpr int kStripOutputs = 16;  // outputs of one mma
constexpr int kBlockInputs = 64;   // inputs of one pipeline stage
constexpr int kStepInputs = 16;    // inputs of one mma
constexpr int kBlockSteps = kBlockInputs / kStepInputs;
constexpr int kPlainOutputs = 32;  // outputs side by side in an f32 weight

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Enough splits for 128 units of 128 outputs, about as many as the largest chips have
// multiprocessors, as long as each split keeps 256 inputs. linear.cu has the table.
constexpr int num_splits(int64_t num_outputs, int64_t num_inputs) {
  constexpr int64_t kUnitOutputs = 128, kUnits = 128, kSplitBlocks = 4, kMaxSplits = 16;
  const int64_t tiles = ceil_div(num_outputs, kUnitOutputs);
  const int64_t blocks = ceil_div(num_inputs, kBlockInputs);
  int64_t splits = 1;
  while (tiles * splits < kUnits && blocks / (2 * splits) >= kSplitBlocks && splits < kMaxSplits) {
    splits *= 2;
  }
  return static_cast<int>(splits);
}

MEDUSA_HD constexpr int split_begin(int split, int splits, int num_blocks) {
  return static_cast<int>(int64_t{num_blocks} * split / splits);
}

// Index of element (output, input) of a 16-bit weight with that many blocks in a strip.
MEDUSA_HD constexpr int64_t packed_index(int64_t output, int64_t input, int64_t num_blocks) {
  const int64_t step = output / kStripOutputs * num_blocks * kBlockSteps + input / kStepInputs;
  const int row = static_cast<int>(output % kStripOutputs);
  const int column = static_cast<int>(input % kStepInputs);
  const int lane = row % 8 * 4 + column % 8 / 2;
  const int reg = row / 8 + column / 8 * 2;
  return (step * 32 + lane) * 8 + reg * 2 + column % 2;
}

// The same for an f32 weight.
MEDUSA_HD constexpr int64_t plain_index(int64_t output, int64_t input, int64_t num_inputs) {
  return (output / kPlainOutputs * num_inputs + input) * kPlainOutputs + output % kPlainOutputs;
}

// Index of an element of a weight of T.
template <class T>
MEDUSA_HD constexpr int64_t weight_index(int64_t output, int64_t input, int64_t num_inputs) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return plain_index(output, input, num_inputs);
  } else {
    return packed_index(output, input, (num_inputs + kBlockInputs - 1) / kBlockInputs);
  }
}

class PackedWeight final : public Weight {
 public:
  PackedWeight(int64_t num_outputs, int64_t num_inputs, DType dtype)
      : memory_(padded_bytes(num_outputs, num_inputs, dtype)) {
    num_outputs_ = num_outputs;
    num_inputs_ = num_inputs;
    dtype_ = dtype;
  }

  int64_t num_bytes() const override { return memory_.num_bytes(); }
  void* data() const { return memory_.data(); }

 private:
  static int64_t padded_bytes(int64_t num_outputs, int64_t num_inputs, DType dtype) {
    if (dtype == DType::f32) {
      return ceil_div(num_outputs, kPlainOutputs) * kPlainOutputs * num_inputs * 4;
    }
    return ceil_div(num_outputs, kStripOutputs) * kStripOutputs *
           ceil_div(num_inputs, kBlockInputs) * kBlockInputs * 2;
  }

  DeviceBuffer memory_;
};

inline const PackedWeight& packed(const Weight& weight) {
  return static_cast<const PackedWeight&>(weight);
}

}  // namespace medusa::cuda
