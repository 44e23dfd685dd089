// medusa_ext._core: the compiled module. Bindings borrow arrays, release the interpreter lock and
// call one function.
// SPDX-License-Identifier: Apache-2.0
#include <exception>

#include "python/bindings.h"

namespace medusa::python {

TensorView borrow(const py::array& array, const std::optional<std::string>& dtype,
                  const std::string& name) {
  MEDUSA_CHECK_ARG(array.ndim() >= 1 && array.ndim() <= 3, name, ": the array has rank ",
                   array.ndim(), "; wanted 1 to 3");
  const int wanted = int{py::array::c_style} | int{py::detail::npy_api::NPY_ARRAY_ALIGNED_};
  MEDUSA_CHECK_ARG(
      (array.flags() & wanted) == wanted, name,
      ": the array is not C-contiguous and aligned; pass numpy.ascontiguousarray(array)");
  const std::string found = py::str(array.dtype());
  const DType given = dtype && dtype != "i32" ? parse_weight_dtype(*dtype) : DType::i32;
  TensorView view;
  if (found == "float32") {
    view.dtype = DType::f32;
  } else if (found == "float16") {
    view.dtype = DType::f16;
  } else if (found == "int32") {
    view.dtype = DType::i32;
  } else if (found == "uint16" && dtype == "bf16") {
    view.dtype = DType::bf16;
  } else if (found == "uint8" && is_block(given)) {
    view.dtype = given;
  } else {
    throw ArgumentError(concat(name, ": the array holds ", found,
                               "; wanted float32, float16, int32, uint16 with dtype=\"bf16\", or "
                               "uint8 with the name of a block type"));
  }
  MEDUSA_CHECK_ARG(!dtype || given == view.dtype, name, ": dtype is ", *dtype, ", the array holds ",
                   found);
  view.data = const_cast<void*>(array.data());  // the callee only reads what it was given to read
  view.rank = static_cast<int>(array.ndim());
  for (int axis = 0; axis < view.rank; ++axis) {
    view.shape[static_cast<size_t>(axis)] = array.shape(axis);
  }
  if (is_block(view.dtype)) {
    int64_t& last = view.shape[static_cast<size_t>(view.rank - 1)];
    MEDUSA_CHECK_ARG(last % block_bytes(view.dtype) == 0, name, ": rows of ", last,
                     " bytes; a block of ", *dtype, " has ", block_bytes(view.dtype));
    last = last / block_bytes(view.dtype) * block_elements(view.dtype);
  }
  return view;
}

std::vector<int32_t> token_ids(const std::vector<int64_t>& tokens) {
  std::vector<int32_t> ids;
  ids.reserve(tokens.size());
  for (const int64_t token : tokens) {
    MEDUSA_CHECK_ARG(token >= 0 && token <= INT32_MAX, "token ", token,
                     " is outside the vocabulary");
    ids.push_back(static_cast<int32_t>(token));
  }
  return ids;
}

}  // namespace medusa::python

// ArgumentError and OutOfMemory need nothing here: pybind11 turns their bases into ValueError and
// MemoryError.
PYBIND11_MODULE(_core, m) {
  namespace py = pybind11;
  m.attr("__version__") = MEDUSA_VERSION;
  py::register_exception<medusa::InternalError>(m, "InternalError", PyExc_RuntimeError)
      .attr("__module__") = "medusa_ext";
  py::register_exception<medusa::CudaError>(m, "CudaError", PyExc_RuntimeError).attr("__module__") =
      "medusa_ext";
  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const medusa::UnsupportedError& error) {
      py::set_error(PyExc_NotImplementedError, error.what());
    }
  });
  medusa::python::bind_model(m);
  medusa::python::bind_session(m);
  medusa::python::bind_guesses(m);
  medusa::python::bind_ops(m);
}
