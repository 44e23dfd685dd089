// Packed weights: make_weight, pack and embed.
// SPDX-License-Identifier: Apache-2.0
#include <cstring>
#include <vector>

#include "backend/cpu/cpu_backend.h"
#include "backend/cpu/packed_weight.h"
#include "medusa/error.h"

namespace medusa::cpu {
namespace {

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
  if (is_block(weight.dtype())) return pack_blocks(weight, first_output, src);
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

// Traffic: source and weight once.
void CpuBackend::pack_blocks(Weight& weight, int64_t first_output, TensorView src) {
  const PackedWeight& target = packed(weight);
  const DType dtype = weight.dtype();
  const int64_t K = weight.num_inputs(), end = first_output + src.size(0);
  const int64_t row_bytes = K / block_elements(dtype) * block_bytes(dtype);
  const int64_t first_block = first_output / kColumns, last_block = (end + kColumns - 1) / kColumns;
  split(last_block - first_block, kColumns * K, [&](int64_t first, int64_t last) {
    std::vector<float> values;
    std::vector<uint8_t> blocks;
    for (int64_t output = std::max((first_block + first) * kColumns, first_output);
         output < std::min((first_block + last) * kColumns, end); ++output) {
      const uint8_t* row = src.as<uint8_t>() + (output - first_output) * row_bytes;
      if (src.dtype != dtype) {
        values.resize(static_cast<size_t>(K));
        blocks.resize(static_cast<size_t>(row_bytes));
        kernels_.convert(src.as<char>() + (output - first_output) * K * dtype_bytes(src.dtype),
                         src.dtype, values.data(), DType::f32, K);
        quantise_row(kernels_, dtype, values.data(), K, blocks.data());
        row = blocks.data();
      }
      const bool finite =
          place_row(dtype, row, K, reinterpret_cast<uint8_t*>(target.block(output / kColumns)),
                    static_cast<int>(output % kColumns));
      MEDUSA_CHECK_ARG(finite, "row ", output - first_output,
                       " holds a value that is no finite number, or too large for ",
                       dtype_name(dtype),
                       "; the file is damaged, or wants weights=\"bf16\" or \"f32\"");
    }
  });
}

// Traffic: one cache line for every pair of values of a row (four where they lie in blocks).
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
      const char* block = source.block(token / kColumns);
      if (is_block(weight.dtype())) {
        read_row(kernels_, weight.dtype(), reinterpret_cast<const uint8_t*>(block), K,
                 token % kColumns, values);
      }
      for (int64_t k = is_block(weight.dtype()) ? K : 0; k < K; k += kPiece) {
        const int64_t count = std::min(kPiece, K - k);
        const char* from = block + packed_index(k, token % kColumns, kColumns, pair) * bytes;
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

}  // namespace medusa::cpu
