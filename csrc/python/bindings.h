// What the binding files share: their entry points, and arrays borrowed as views.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "medusa/error.h"
#include "medusa/tensor.h"

namespace medusa::python {

namespace py = pybind11;

void bind_model(py::module_& m);
void bind_session(py::module_& m);
void bind_ops(py::module_& m);

using Release = py::call_guard<py::gil_scoped_release>;

// A C-contiguous array of rank 1 to 3 as it lies; valid while `array` lives. `dtype` names the
// elements where NumPy cannot ("bf16" in a uint16 array); `name` stands in the errors.
TensorView borrow(const py::array& array, const std::optional<std::string>& dtype,
                  const std::string& name);

// Token ids of any Python integers; ArgumentError where one does not fit 32 bits.
std::vector<int32_t> token_ids(const std::vector<int64_t>& tokens);

}  // namespace medusa::python
