// SPDX-License-Identifier: Apache-2.0
#include "arguments.h"

#include <algorithm>
#include <csignal>
#include <iostream>
#include <sstream>

#include "medusa/error.h"

namespace medusa::bench {
namespace {

volatile std::sig_atomic_t stop_signal = 0;

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> parts;
  std::istringstream in(text);
  for (std::string part; std::getline(in, part, ',');) parts.push_back(part);
  return parts;
}

int parse_count(const std::string& name, const std::string& text, int low, int high) {
  size_t used = 0;
  int value = 0;
  try {
    value = std::stoi(text, &used);
  } catch (const std::exception&) {
    used = 0;
  }
  MEDUSA_CHECK_ARG(used > 0 && used == text.size() && value >= low && value <= high, name,
                   ": found \"", text, "\", wanted a number from ", low, " to ", high);
  return value;
}

Common take_common(Arguments& args) {
  constexpr int kMaxSamples = 100000;
  Common common;
  common.backend.device = args.text("--device", "cpu");
  MEDUSA_CHECK_ARG(common.backend.device != "auto", "--device: name the device, cpu or cuda");
  common.backend.threads = args.count("--threads", 0, 1, 1024);
  common.backend.isa = args.text("--isa", "");
  common.shapes = args.texts("--shape");
  for (const std::string& name : split(args.text("--dtype", "bf16"))) {
    common.dtypes.push_back(parse_dtype(name));
    MEDUSA_CHECK_ARG(common.dtypes.back() != DType::i32, "--dtype: i32 is no weight's type");
  }
  MEDUSA_CHECK_ARG(!common.dtypes.empty(), "--dtype is empty; wanted bf16, f16 or f32");
  common.json = args.flag("--json");
  common.quick = args.flag("--quick");
  common.warm = args.flag("--warm");
  common.samples = args.count("--samples", common.quick ? 20 : 100, 1, kMaxSamples);
  common.warm_ups = std::min(10, common.samples);
  common.copy_gbs = args.positive("--copy-gbs", 0);
  common.matrix_tflops = args.positive("--matrix-tflops", 0);
  common.baseline = args.text("--baseline", "");
  return common;
}

}  // namespace

const char* const kCommonUsage =
    "  --device cpu|cuda|cuda:N|cuda-emulated   --threads N   --isa generic|avx2|avx512\n"
    "  --dtype bf16,f16,f32   --samples N   --quick   --warm (one copy of the data, in the cache)\n"
    "  --copy-gbs X, --matrix-tflops X: ceilings measured elsewhere   --baseline RESULTS.json\n"
    "  --json: to stdout, the table then goes to stderr\n";

bool Arguments::flag(const std::string& name) {
  const auto found = std::find(args_.begin(), args_.end(), name);
  if (found == args_.end()) return false;
  args_.erase(found);
  return true;
}

std::string Arguments::text(const std::string& name, const std::string& otherwise) {
  const auto found = std::find(args_.begin(), args_.end(), name);
  if (found == args_.end()) return otherwise;
  MEDUSA_CHECK_ARG(found + 1 != args_.end() && !found[1].starts_with("--"), name, " needs a value");
  const std::string value = found[1];
  args_.erase(found, found + 2);
  return value;
}

int Arguments::count(const std::string& name, int otherwise, int low, int high) {
  const std::string value = text(name, "");
  return value.empty() ? otherwise : parse_count(name, value, low, high);
}

std::vector<int> Arguments::counts(const std::string& name, const std::vector<int>& otherwise,
                                   int low, int high) {
  std::vector<int> values;
  for (const std::string& part : split(text(name, ""))) {
    values.push_back(parse_count(name, part, low, high));
  }
  return values.empty() ? otherwise : values;
}

std::vector<std::string> Arguments::texts(const std::string& name) { return split(text(name, "")); }

double Arguments::positive(const std::string& name, double otherwise) {
  const std::string value = text(name, "");
  if (value.empty()) return otherwise;
  std::istringstream in(value);
  double number = 0;
  MEDUSA_CHECK_ARG(in >> number && in.eof() && number > 0, name, ": found \"", value,
                   "\", wanted a positive number");
  return number;
}

std::string Arguments::positional() {
  if (args_.empty() || args_.front().starts_with('-')) return "";
  const std::string value = args_.front();
  args_.erase(args_.begin());
  return value;
}

void Arguments::finish() const {
  MEDUSA_CHECK_ARG(args_.empty(), "unknown option or argument: ", args_.front());
}

int run_program(const char* name, const std::string& usage, int argc, char** argv,
                const std::function<void(Arguments&, Common&)>& body) {
  try {
    const std::vector<std::string> words(argv + 1, argv + argc);
    Arguments args(words);
    if (args.flag("--help") || args.flag("-h")) {
      std::cout << usage << kCommonUsage;
      return 0;
    }
    std::signal(SIGTERM, [](int) { stop_signal = 1; });
    Common common = take_common(args);
    common.command = name;
    for (const std::string& word : words) common.command += " " + word;
    body(args, common);
    return 0;
  } catch (const ArgumentError& error) {
    std::cerr << name << ": " << error.what() << "\n";
    return 2;
  } catch (const std::exception& error) {
    std::cerr << name << ": " << error.what() << "\n";
    return 1;
  }
}

bool stop_requested() { return stop_signal != 0; }

}  // namespace medusa::bench
