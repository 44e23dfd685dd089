// What the binding files share: their entry points, and arrays borrowed as views.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>
#include <cstdint>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "medusa/error.h"
#include "medusa/tensor.h"

namespace medusa::python {

namespace py = pybind11;

void bind_model(py::module_& m);
void bind_session(py::module_& m);
void bind_guesses(py::module_& m);
void bind_ops(py::module_& m);

// Lets other Python threads run during a call. A daemon thread that comes back while the
// interpreter ends must stop here: CPython before 3.14 would end it by unwinding the C++ frames
// below.
class ReleasedLock {
 public:
  ReleasedLock() : state_(PyEval_SaveThread()) {}
  ~ReleasedLock() noexcept(false) {
#if PY_VERSION_HEX >= 0x030D0000
    const bool finalizing = Py_IsFinalizing() != 0;
#else
    const bool finalizing = _Py_IsFinalizing() != 0;
#endif
    while (finalizing) std::this_thread::sleep_for(std::chrono::hours(1));
    PyEval_RestoreThread(state_);
  }
  ReleasedLock(const ReleasedLock&) = delete;
  ReleasedLock& operator=(const ReleasedLock&) = delete;

 private:
  PyThreadState* state_;
};

using Release = py::call_guard<ReleasedLock>;

// A C-contiguous array of rank 1 to 3 as it lies; valid while `array` lives. `dtype` names the
// elements where NumPy cannot ("bf16" in a uint16 array, blocks in rows of uint8, whose shape
// becomes that of their elements); `name` stands in the errors.
TensorView borrow(const py::array& array, const std::optional<std::string>& dtype,
                  const std::string& name);

// Token ids of any Python integers; ArgumentError where one does not fit 32 bits.
std::vector<int32_t> token_ids(const std::vector<int64_t>& tokens);

}  // namespace medusa::python
