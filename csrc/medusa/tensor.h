// Views of memory that somebody else owns, and the element types they hold.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

namespace medusa {

// The last four are of weights alone: blocks of 32 or 256 consecutive inputs of one output, as GGUF
// files hold them.
enum class DType : uint8_t { f32, f16, bf16, i32, q8_0, q4_0, q4_1, q4_k };

constexpr bool is_block(DType dtype) { return dtype >= DType::q8_0; }

constexpr int64_t block_elements(DType dtype) {  // 1: no block
  return dtype == DType::q4_k ? 256 : is_block(dtype) ? 32 : 1;
}

constexpr int64_t block_bytes(DType dtype) {
  switch (dtype) {
    case DType::q8_0:
      return 34;
    case DType::q4_0:
      return 18;
    case DType::q4_1:
      return 20;
    case DType::q4_k:
      return 144;
    default:
      return dtype == DType::f32 || dtype == DType::i32 ? 4 : 2;
  }
}

constexpr int64_t dtype_bytes(DType dtype) { return block_bytes(dtype); }  // of no block type

const char* dtype_name(DType dtype);
DType parse_dtype(const std::string& name);  // "f32" | "f16" | "bf16"; ArgumentError otherwise
// Those and "q8_0" | "q4_0" | "q4_1" | "q4_k".
DType parse_weight_dtype(const std::string& name);

// A dense row-major array of rank 1 to 3; the memory is the caller's. `shape` counts elements, also
// where they lie in blocks along the last axis.
struct TensorView {
  void* data = nullptr;
  DType dtype = DType::f32;
  int rank = 0;
  std::array<int64_t, 3> shape{1, 1, 1};

  TensorView() = default;
  TensorView(void* memory, DType type, int64_t rows)
      : data(memory), dtype(type), rank(1), shape{rows, 1, 1} {}
  TensorView(void* memory, DType type, int64_t rows, int64_t columns)
      : data(memory), dtype(type), rank(2), shape{rows, columns, 1} {}
  TensorView(void* memory, DType type, int64_t a, int64_t b, int64_t c)
      : data(memory), dtype(type), rank(3), shape{a, b, c} {}

  int64_t size(int axis) const { return shape[static_cast<size_t>(axis)]; }
  int64_t num_elements() const { return shape[0] * shape[1] * shape[2]; }
  int64_t num_bytes() const { return num_elements() / block_elements(dtype) * block_bytes(dtype); }

  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

std::string shape_string(const TensorView& view);  // "[3, 64]"

}  // namespace medusa
