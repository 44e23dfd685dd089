// A weight in the layout that the products stream: blocks of 32 outputs, all their inputs, end to
// end.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <memory>

#include "backend/cpu/block_weight.h"
#include "backend/cpu/layout.h"
#include "backend/cpu/memory.h"

namespace medusa::cpu {

// [ceil(N / 32)] of [K / pair][32][pair], or of the tiles of kernels/block_layout.h; outputs beyond
// N are zero.
class PackedWeight final : public Weight {
 public:
  PackedWeight(int64_t num_outputs, int64_t num_inputs, DType dtype) {
    num_outputs_ = num_outputs;
    num_inputs_ = num_inputs;
    dtype_ = dtype;
    block_bytes_ = is_block(dtype) ? tiles_bytes(dtype, num_inputs)
                                   : kColumns * num_inputs * dtype_bytes(dtype);
    memory_ = map_memory(num_blocks() * block_bytes_, true);
  }
  int64_t num_bytes() const override { return memory_->num_bytes(); }
  int64_t num_blocks() const { return (num_outputs_ + kColumns - 1) / kColumns; }
  int64_t block_bytes() const { return block_bytes_; }
  char* block(int64_t index) const {
    return static_cast<char*>(memory_->data()) + index * block_bytes_;
  }
  // First block of the range that thread `index` of `count` walks through.
  int64_t first_of(int64_t index, int64_t count) const { return num_blocks() * index / count; }

 private:
  int64_t block_bytes_;
  std::unique_ptr<Buffer> memory_;
};

inline const PackedWeight& packed(const Weight& weight) {
  return static_cast<const PackedWeight&>(weight);
}

}  // namespace medusa::cpu
