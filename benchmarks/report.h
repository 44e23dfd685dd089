// What every benchmark prints: the machine and its ceilings, then one row per shape.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "measure.h"

namespace medusa::bench {

std::string fixed(double value, int digits);
std::string mib(int64_t bytes);

// Facts and ceilings of the machine; 0 or "" where unknown.
struct Machine {
  std::string program, command, backend, compiler, toolkit, commit, driver, clocks;
  std::string bandwidth_kind;  // of copy_gbs: "read" on the CPU
  std::string matrix_source;
  double copy_gbs = 0, datasheet_gbs = 0, matrix_tflops = 0;
  std::map<std::string, double> matrix_rates;  // of a CPU, see matrix_rate.h

  double matrix_rate(const std::string& dtype) const;  // TFLOP/s; 0: unknown
};

// Measures the bandwidth, unless the command line gives a greater one.
Machine describe(const std::string& program, const Common& common, Backend& backend);
std::string markdown(const Machine& machine);      // a list
std::string json_members(const Machine& machine);  // without braces

// The cases of a run. One that fails leaves the others alone, until the device itself has failed or
// the program is to stop.
class Cases {
 public:
  // What was wrong, "" if nothing.
  std::string run(const std::function<void()>& body);
  void finish() const;  // InternalError: not every case passed

 private:
  int num_failed_ = 0, num_left_out_ = 0;
  std::string device_error_;
};

// The table of one program. Rows go out as they come, so that a run that is stopped keeps them; in
// JSON mode to stderr, and all of it to stdout at the end.
class Report {
 public:
  Report(const std::string& program, const Common& common, Backend& backend);
  void note(const std::string& text);  // a line above the table
  void add(const std::string& op, const std::string& shape, const std::string& dtype,
           const Samples& seconds, int64_t num_bytes, int64_t flops);
  // Runs a case, which adds its row; what is wrong with it becomes a row instead.
  void attempt(const std::string& op, const std::string& shape, const std::string& dtype,
               const std::function<void()>& body);
  void finish();  // InternalError, after all is printed: not every case passed

 private:
  void begin_table();
  void line(const std::string& text) const;

  const Common& common_;
  Machine machine_;
  std::map<std::tuple<std::string, std::string, std::string>, double> baseline_us_;
  Cases cases_;
  std::vector<std::string> json_rows_;
  bool header_done_ = false;
};

}  // namespace medusa::bench
