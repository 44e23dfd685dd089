// Names of element types, and shapes as text.
// SPDX-License-Identifier: Apache-2.0
#include "medusa/tensor.h"

#include "medusa/error.h"

namespace medusa {

const char* dtype_name(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return "f32";
    case DType::f16:
      return "f16";
    case DType::bf16:
      return "bf16";
    case DType::i32:
      return "i32";
  }
  return "unknown";
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
