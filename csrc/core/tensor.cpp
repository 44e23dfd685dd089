// Names of element types, and shapes as text.
// SPDX-License-Identifier: Apache-2.0
#include "medusa/tensor.h"

#include <array>

#include "medusa/error.h"

namespace medusa {

namespace {

constexpr std::array<const char*, 8> kNames{"f32",  "f16",  "bf16", "i32",
                                            "q8_0", "q4_0", "q4_1", "q4_k"};

}  // namespace

const char* dtype_name(DType dtype) { return kNames.at(static_cast<size_t>(dtype)); }

DType parse_weight_dtype(const std::string& name) {
  for (size_t i = 0; i < kNames.size(); ++i) {
    const auto dtype = static_cast<DType>(i);
    if (name == kNames[i] && dtype != DType::i32) return dtype;
  }
  throw ArgumentError(concat("a weight's type is \"", name,
                             "\"; choose \"bf16\", \"f16\", \"f32\", \"q8_0\", \"q4_0\", "
                             "\"q4_1\" or \"q4_k\""));
}

DType parse_dtype(const std::string& name) {
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    if (name == dtype_name(dtype)) return dtype;
  }
  throw ArgumentError(concat("dtype is \"", name, "\"; choose \"bf16\", \"f16\" or \"f32\""));
}

std::string shape_string(const TensorView& view) {
  std::string text = "[";
  for (int axis = 0; axis < view.rank; ++axis) {
    if (axis > 0) text += ", ";
    text += std::to_string(view.size(axis));
  }
  return text + "]";
}

}  // namespace medusa
