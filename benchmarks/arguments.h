// Command lines of the benchmarks: options are taken by name, what is left over is an error.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "medusa/backend.h"

namespace medusa::bench {

class Arguments {
 public:
  explicit Arguments(std::vector<std::string> args) : args_(std::move(args)) {}

  bool flag(const std::string& name);
  std::string text(const std::string& name, const std::string& otherwise);
  int count(const std::string& name, int otherwise, int low, int high);
  std::vector<int> counts(const std::string& name, const std::vector<int>& otherwise, int low,
                          int high);                           // separated by commas
  std::vector<std::string> texts(const std::string& name);     // separated by commas
  double positive(const std::string& name, double otherwise);  // in the unit of the name
  std::string positional();                                    // "": none
  void finish() const;                                         // ArgumentError: something is left

 private:
  std::vector<std::string> args_;
};

// What all programs take.
struct Common {
  BackendOptions backend;
  std::vector<std::string> shapes;  // empty: the program's own choice
  std::vector<DType> dtypes;
  bool json = false, quick = false, warm = false;
  int samples = 0, warm_ups = 0;
  double copy_gbs = 0, matrix_tflops = 0;  // 0: measured here; of the datasheet
  std::string baseline;                    // JSON of an earlier run, "": none
  std::string command;

  bool on_cpu() const { return backend.device == "cpu"; }
  bool emulated() const { return backend.device == "cuda-emulated"; }
  bool tiny() const { return shapes == std::vector<std::string>{"tiny"}; }
};

// Their lines of a usage text.
extern const char* const kCommonUsage;

// Exit status: 2 for a wrong command line, 1 for a failure. SIGTERM ends nothing at once, see
// stop_requested().
int run_program(const char* name, const std::string& usage, int argc, char** argv,
                const std::function<void(Arguments&, Common&)>& body);

// Whether somebody, such as timeout, has asked the program to end: it prints what it has and does.
bool stop_requested();

}  // namespace medusa::bench
