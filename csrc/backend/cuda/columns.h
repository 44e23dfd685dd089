// Columns of a row, four to a thread: loads, rounded stores and the conversions behind them; the
// element types of tensors as template types.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "backend/cuda/gpu.h"
#include "medusa/error.h"
#include "medusa/tensor.h"

namespace medusa::cuda {

__device__ __forceinline__ float to_f32(float x) { return x; }
__device__ __forceinline__ float to_f32(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_f32(__nv_bfloat16 x) { return __bfloat162float(x); }

// To nearest even.
template <class T>
__device__ __forceinline__ T round_to(float x) {
  if constexpr (sizeof(T) == 4) {
    return x;
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else {
    return __float2bfloat16_rn(x);
  }
}

template <int kWidth>
struct Columns {
  float value[kWidth];
};
using Quad = Columns<4>;

template <class T, int kWidth>
struct alignas(sizeof(T) * kWidth) Packed {
  T value[kWidth];
};

// kWidth columns that exist and are aligned to their size.
template <int kWidth>
__device__ __forceinline__ Columns<kWidth> load_columns(const float* from) {
  const auto packed = *reinterpret_cast<const Packed<float, kWidth>*>(from);
  Columns<kWidth> columns;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) columns.value[i] = packed.value[i];
  return columns;
}

template <class T, int kWidth>
__device__ __forceinline__ void store_columns(T* to, const Columns<kWidth>& columns) {
  Packed<T, kWidth> packed;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) packed.value[i] = round_to<T>(columns.value[i]);
  *reinterpret_cast<Packed<T, kWidth>*>(to) = packed;
}

// Columns [column, column + 4) of a row of `size`; those beyond its end are 0. `wide`: the row may
// be read four columns at a time (see is_wide). The columns of a thread are the same either way.
__device__ __forceinline__ Quad load_quad(const float* row, int64_t column, int64_t size,
                                          bool wide) {
  if (wide && column < size) return load_columns<4>(row + column);
  Quad quad;
#pragma unroll
  for (int i = 0; i < 4; ++i) quad.value[i] = column + i < size ? row[column + i] : 0.0f;
  return quad;
}

template <class T>
__device__ __forceinline__ void store_quad(T* row, int64_t column, int64_t size, bool wide,
                                           const Quad& quad) {
  if (wide && column < size) return store_columns(row + column, quad);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (column + i < size) row[column + i] = round_to<T>(quad.value[i]);
  }
}

// Rows of this size that start here can be moved four columns at a time.
inline bool is_wide(const void* data, DType dtype, int64_t row_size) {
  return row_size % 4 == 0 &&
         reinterpret_cast<uintptr_t>(data) % (4 * static_cast<uintptr_t>(dtype_bytes(dtype))) == 0;
}

inline bool is_wide(const TensorView& view) {
  return is_wide(view.data, view.dtype, view.size(view.rank - 1));
}

// function.operator()<T>() with the type of these elements.
template <class Function>
void dispatch_float(DType dtype, const char* op, Function&& function) {
  switch (dtype) {
    case DType::f32:
      return function.template operator()<float>();
    case DType::f16:
      return function.template operator()<__half>();
    case DType::bf16:
      return function.template operator()<__nv_bfloat16>();
    default:
      break;
  }
  throw UnsupportedError(concat(op, ": no kernel for ", dtype_name(dtype), "; f32, f16 or bf16"));
}

}  // namespace medusa::cuda
