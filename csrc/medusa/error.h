// Errors of the public API, and the checks that throw them. Messages state op or field, got,
// wanted.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <new>
#include <sstream>
#include <stdexcept>
#include <string>

namespace medusa {

// The caller's mistake; no work was started. ValueError in Python.
class ArgumentError : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

// A valid request that no kernel serves. NotImplementedError in Python.
class UnsupportedError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Says bytes asked and bytes free. MemoryError in Python.
class OutOfMemory : public std::bad_alloc {
 public:
  explicit OutOfMemory(std::string message) : message_(std::move(message)) {}
  const char* what() const noexcept override { return message_.c_str(); }

 private:
  std::string message_;
};

// The device failed; often it stays so, and whatever used it must be closed. medusa_ext.CudaError
// in Python.
class CudaError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Our bug. medusa_ext.InternalError in Python.
class InternalError : public std::logic_error {
 public:
  using std::logic_error::logic_error;
};

template <class... Parts>
std::string concat(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

}  // namespace medusa

#define MEDUSA_CHECK_ARG(condition, ...)                                            \
  do {                                                                              \
    if (!(condition)) throw ::medusa::ArgumentError(::medusa::concat(__VA_ARGS__)); \
  } while (false)

#define MEDUSA_CHECK_INTERNAL(condition, ...)                                       \
  do {                                                                              \
    if (!(condition)) throw ::medusa::InternalError(::medusa::concat(__VA_ARGS__)); \
  } while (false)
