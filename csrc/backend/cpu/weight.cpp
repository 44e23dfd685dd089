// Packed weights: make_weight, pack, embed and linear.
// SPDX-License-Identifier: Apache-2.0
#include <cstring>
#include <vector>

#include "backend/cpu/cpu_backend.h"
#include "backend/cpu/layout.h"
#include "backend/cpu/memory.h"
#include "medusa/error.h"

namespace medusa::cpu {
namespace {

// [ceil(N / 32)][K / pair][32][pair], columns beyond N are zero.
class PackedWeight final : public Weight {
 public:
  PackedWeight(int64_t num_outputs, int64_t num_inputs, DType dtype) {
    num_outputs_ = num_outputs;
    num_inputs_ = num_inputs;
    dtype_ = dtype;
    memory_ = map_memory(num_blocks() * block_bytes(), true);
  }
  int64_t num_bytes() const override { return memory_->num_bytes(); }
  int64_t num_blocks() const { return (num_outputs_ + kColumns - 1) / kColumns; }
  int64_t block_bytes() const { return kColumns * num_inputs_ * dtype_bytes(dtype_); }
  char* block(int64_t index) const {
    return static_cast<char*>(memory_->data()) + index * block_bytes();
  }

 private:
  std::unique_ptr<Buffer> memory_;
};

const PackedWeight& packed(const Weight& weight) {
  return static_cast<const PackedWeight&>(weight);
}

// Copies row `src` [count] to one column of a block, k from first_k; a T is `pair` values.
template <class T>
void scatter(const void* src, char* block, int64_t first_k, int64_t count, int64_t column,
             int64_t pair) {
  const int64_t num_words = count / pair;
  char* to = block +
             packed_index(first_k, column, kColumns, pair) * static_cast<int64_t>(sizeof(T)) / pair;
  for (int64_t i = 0; i < num_words; ++i) {
    std::memcpy(to + i * kColumns * static_cast<int64_t>(sizeof(T)),
                static_cast<const char*>(src) + i * static_cast<int64_t>(sizeof(T)), sizeof(T));
  }
}

}  // namespace

std::unique_ptr<Weight> CpuBackend::do_make_weight(int64_t num_outputs, int64_t num_inputs,
                                                   DType dtype) {
  if (is_block(dtype)) throw UnsupportedError("make_weight: blocks");  // TODO
  if (num_inputs % pair_of(dtype) != 0) {
    throw UnsupportedError(concat("make_weight: a bf16 weight has ", num_inputs,
                                  " inputs; the CPU needs an even number (or f16, f32)"));
  }
  return std::make_unique<PackedWeight>(num_outputs, num_inputs, dtype);
}

// Traffic: source and weight once. Pieces of 256 values of a row are converted and then spread over
// their column; 32 rows of a block fall into the same cache lines.
void CpuBackend::do_pack(Weight& weight, int64_t first_output, TensorView src) {
  constexpr int64_t kPiece = 256;
  const PackedWeight& target = packed(weight);
  const int64_t K = weight.num_inputs(), end = first_output + src.size(0),
                pair = pair_of(weight.dtype());
  const int64_t first_block = first_output / kColumns, last_block = (end + kColumns - 1) / kColumns;
  split(last_block - first_block, kColumns * K, [&](int64_t first, int64_t last) {
    alignas(64) char piece[kPiece * sizeof(float)];
    for (int64_t block = first_block + first; block < first_block + last; ++block) {
      const int64_t low = std::max(block * kColumns, first_output),
                    high = std::min((block + 1) * kColumns, end);
      for (int64_t k = 0; k < K; k += kPiece) {
        const int64_t count = std::min(kPiece, K - k);
        for (int64_t output = low; output < high; ++output) {
          const char* row =
              src.as<char>() + ((output - first_output) * K + k) * dtype_bytes(src.dtype);
          const void* values = row;
          if (src.dtype != weight.dtype()) {
            kernels_.convert(row, src.dtype, piece, weight.dtype(), count);
            values = piece;
          }
          if (weight.dtype() == DType::f16) {
            scatter<uint16_t>(values, target.block(block), k, count, output % kColumns, pair);
          } else {
            scatter<uint32_t>(values, target.block(block), k, count, output % kColumns, pair);
          }
        }
      }
    }
  });
}

// Traffic: one cache line for every pair of values of a row.
void CpuBackend::do_embed(TensorView tokens, const Weight& weight, float scale, TensorView out) {
  const PackedWeight& source = packed(weight);
  const int64_t K = weight.num_inputs(), pair = pair_of(weight.dtype()),
                bytes = dtype_bytes(weight.dtype());
  for (int64_t row = 0; row < tokens.size(0); ++row) {
    const int32_t token = tokens.as<int32_t>()[row];
    MEDUSA_CHECK_ARG(token >= 0 && token < weight.num_outputs(), "embed: tokens[", row, "] is ",
                     token, "; the vocabulary has ", weight.num_outputs());
  }
  split(tokens.size(0), 8 * K, [&](int64_t first, int64_t last) {
    constexpr int64_t kPiece = 256;
    alignas(64) char piece[kPiece * sizeof(float)];
    for (int64_t row = first; row < last; ++row) {
      const int32_t token = tokens.as<int32_t>()[row];
      float* values = out.as<float>() + row * K;
      for (int64_t k = 0; k < K; k += kPiece) {
        const int64_t count = std::min(kPiece, K - k);
        const char* from = source.block(token / kColumns) +
                           packed_index(k, token % kColumns, kColumns, pair) * bytes;
        for (int64_t i = 0; i < count; i += pair, from += kColumns * pair * bytes) {
          std::memcpy(piece + i * bytes, from, static_cast<size_t>(pair * bytes));
        }
        kernels_.convert(piece, weight.dtype(), values + k, DType::f32, count);
      }
      if (scale != 1.0f) {
        for (int64_t k = 0; k < K; ++k) values[k] *= scale;
      }
    }
  });
}

void CpuBackend::do_linear(TensorView x, const Weight& weight, TensorView bias, bool accumulate,
                           TensorView out) {
  constexpr int64_t kPanelRows = 120;  // these rows of x stay cached while blocks of W pass
  constexpr int64_t kWorthBytes = 32768;
  const PackedWeight& matrix = packed(weight);
  const int64_t R = x.size(0), num_blocks = matrix.num_blocks();
  const int64_t num_panels = (R + kPanelRows - 1) / kPanelRows;
  const int64_t threads = pool_.num_threads();
  const int64_t work = num_blocks * matrix.block_bytes();
  const int64_t num_stripes = std::max<int64_t>(
      1, std::min({num_blocks, 4 * threads, work * std::min<int64_t>(R, 8) / kWorthBytes}));
  const int64_t row_bytes = x.size(1) * dtype_bytes(x.dtype);
  const auto first_of = [&](int64_t panel) { return R * panel / num_panels; };
  const char* rows = x.as<char>();
  if (R > 1) {
    thread_local std::vector<char> memory;
    if (memory.size() < static_cast<size_t>(R * row_bytes)) {
      memory.resize(static_cast<size_t>(R * row_bytes));
    }
    char* arranged = memory.data();
    pool_.run(static_cast<int>(num_panels), [&](int panel) {
      const int64_t first = first_of(panel);
      kernels_.arrange_rows(weight.dtype(), rows + first * row_bytes, first_of(panel + 1) - first,
                            x.size(1), arranged + first * row_bytes);
    });
    rows = arranged;
  }
  pool_.run(static_cast<int>(num_panels * num_stripes), [&](int task) {
    const int64_t panel = task / num_stripes, stripe = task % num_stripes;
    const int64_t first_row = first_of(panel), last_row = first_of(panel + 1);
    LinearTask part;
    part.dtype = weight.dtype();
    part.weight = matrix.block(0);
    part.x = rows + first_row * row_bytes;
    part.bias = bias.as<float>();
    part.out = out.as<float>() + first_row * out.size(1);
    part.accumulate = accumulate;
    part.num_rows = last_row - first_row;
    part.num_inputs = weight.num_inputs();
    part.num_outputs = weight.num_outputs();
    part.first_block = num_blocks * stripe / num_stripes;
    part.last_block = num_blocks * (stripe + 1) / num_stripes;
    kernels_.linear(part);
  });
}

}  // namespace medusa::cpu
