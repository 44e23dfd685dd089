// SPDX-License-Identifier: Apache-2.0
#include "report.h"

#include <algorithm>
#include <cctype>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <sstream>

#include "core/json.h"
#include "matrix_rate.h"
#include "medusa/error.h"

namespace medusa::bench {
namespace {

// Vendors' figures: GB/s of the memory, dense bf16 TFLOP/s of the matrix units. The longer of two
// names that fit stands first.
struct Datasheet {
  const char* name;
  double gbs, tflops;
};
constexpr Datasheet kDatasheets[] = {{"H200", 4800, 989},
                                     {"H100 PCIe", 2000, 756},
                                     {"H100 80GB HBM3", 3350, 989},
                                     {"A100-SXM4-80GB", 2039, 312},
                                     {"A100-SXM4-40GB", 1555, 312},
                                     {"A100 80GB PCIe", 1935, 312},
                                     {"L40S", 864, 362},
                                     {"L4", 300, 121},
                                     {"RTX 4090", 1008, 165}};

std::string first_line_of(const std::string& command) {
  std::string text;
  if (std::FILE* pipe = popen(command.c_str(), "r")) {
    char buffer[256];
    if (std::fgets(buffer, sizeof buffer, pipe) != nullptr) text = buffer;
    pclose(pipe);
  }
  while (!text.empty() && (text.back() == '\n' || text.back() == ' ')) text.pop_back();
  return text;
}

std::string nvidia_smi(const Common& common, const std::string& fields) {
  const std::string& device = common.backend.device;
  std::string index = device.starts_with("cuda:") ? device.substr(5) : "0";
  // The runtime counts the devices that it is shown, nvidia-smi all there are.
  if (const char* shown = std::getenv("CUDA_VISIBLE_DEVICES")) {
    std::istringstream names(shown);
    for (int i = std::stoi(index); i >= 0 && std::getline(names, index, ','); --i) continue;
  }
  const auto plain = [](unsigned char c) { return std::isalnum(c) || c == '-' || c == '/'; };
  if (!std::all_of(index.begin(), index.end(), plain)) return "";  // it goes to a shell
  return first_line_of("nvidia-smi -i " + index + " --query-gpu=" + fields +
                       " --format=csv,noheader 2>/dev/null");
}

double measured_gbs(const Common& common, Backend& backend) {
  constexpr int kPasses = 12;
  const std::unique_ptr<Bandwidth> bandwidth = make_bandwidth(backend, common);
  Samples samples;
  for (int i = 0; i < kPasses; ++i) samples.add(bandwidth->sample());
  return 1e-9 * samples.greatest();
}

// Times of an earlier run, or of somebody else's product, by (op, shape, dtype).
std::map<std::tuple<std::string, std::string, std::string>, double> read_baseline(
    const std::string& path) {
  std::map<std::tuple<std::string, std::string, std::string>, double> times;
  if (path.empty()) return times;
  std::ifstream file(path);
  MEDUSA_CHECK_ARG(file.good(), "--baseline: cannot read ", path);
  std::stringstream text;
  text << file.rdbuf();
  const json::Value value = json::parse(text.str(), path);
  const json::Value* rows = json::find(value.as_object(path), "rows");
  MEDUSA_CHECK_ARG(rows != nullptr, path, ": has no \"rows\"");
  for (const json::Value& item : rows->as_array(path)) {
    const json::Value::Object& row = item.as_object(path);
    if (json::find(row, "error") != nullptr) continue;
    const auto text_of = [&](const char* key) {
      const json::Value* found = json::find(row, key);
      MEDUSA_CHECK_ARG(found != nullptr, path, ": a row has no \"", key, "\"");
      return found->as_string(path);
    };
    const json::Value* time = json::find(row, "median_us");
    MEDUSA_CHECK_ARG(time != nullptr, path, ": a row has no \"median_us\"");
    times[{text_of("op"), text_of("shape"), text_of("dtype")}] = time->as_float(path);
  }
  return times;
}

}  // namespace

std::string fixed(double value, int digits) {
  char text[64];
  std::snprintf(text, sizeof text, "%.*f", digits, value);
  return text;
}

std::string mib(int64_t bytes) { return fixed(static_cast<double>(bytes) / (1 << 20), 1); }

Machine describe(const std::string& program, const Common& common, Backend& backend) {
  Machine m;
  m.program = program;
  m.command = common.command;
  m.backend = backend.name() + " (" + backend.detail() + ")";
  m.compiler = MEDUSA_COMPILER;
  m.toolkit = MEDUSA_CUDA_TOOLKIT;
  m.commit = MEDUSA_COMMIT;
  m.bandwidth_kind = common.on_cpu() ? "read" : "copy";
  if (!common.on_cpu() && !common.emulated()) {
    m.driver = nvidia_smi(common, "driver_version");
    for (const Datasheet& sheet : kDatasheets) {
      if (m.datasheet_gbs > 0 || backend.detail().find(sheet.name) == std::string::npos) continue;
      m.datasheet_gbs = sheet.gbs;
      m.matrix_tflops = sheet.tflops;
      m.matrix_source = "datasheet, bf16";
    }
  }
  m.copy_gbs = std::max(measured_gbs(common, backend), common.copy_gbs);
  if (!m.driver.empty()) {  // read while the device is awake
    m.clocks = nvidia_smi(common, "clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem");
  }
  if (common.matrix_tflops > 0) {
    m.matrix_tflops = common.matrix_tflops;
    m.matrix_source = "measured, given on the command line";
  } else if (common.on_cpu()) {
    const std::string detail = backend.detail();
    m.matrix_rates = matrix_rates(detail.substr(0, detail.find(',')), backend.threads());
  }
  return m;
}

double Machine::matrix_rate(const std::string& dtype) const {
  if (matrix_tflops > 0) return matrix_tflops;
  // Blocks are multiplied as 8-bit integers; f16 is widened to f32.
  const auto found = matrix_rates.find(dtype.starts_with("q") ? "int8" : dtype);
  const auto other = matrix_rates.find("f32");
  if (found != matrix_rates.end()) return found->second;
  return other == matrix_rates.end() ? 0 : other->second;
}

std::string markdown(const Machine& m) {
  std::ostringstream out;
  const auto known = [](const std::string& text) { return text.empty() ? "unknown" : text; };
  out << "- command: `" << m.command << "`\n- backend: " << m.backend;
  if (m.backend.starts_with("cuda-emulated")) out << ": no time below means anything";
  out << "\n- built by " << m.compiler << ", CUDA " << known(m.toolkit) << ", commit "
      << known(m.commit) << "\n";
  if (!m.driver.empty()) {
    out << "- driver " << m.driver << "; clocks now (SM, memory) and highest: " << m.clocks << "\n";
  }
  out << "- " << m.bandwidth_kind << " bandwidth: " << fixed(m.copy_gbs, 1) << " GB/s measured";
  if (m.datasheet_gbs > 0) out << ", " << fixed(m.datasheet_gbs, 0) << " by the datasheet";
  out << "\n- matrix rate: ";
  if (m.matrix_tflops > 0) {
    out << fixed(m.matrix_tflops, 0) << " TFLOP/s (" << m.matrix_source << ")\n";
  } else if (!m.matrix_rates.empty()) {
    std::string rates;
    for (const auto& [name, rate] : m.matrix_rates) {
      rates += concat(rates.empty() ? "" : ", ", name, " ", fixed(rate, 2));
    }
    out << rates << " TFLOP/s measured in registers\n";
  } else {
    out << "unknown\n";
  }
  return out.str();
}

std::string json_members(const Machine& m) {
  std::ostringstream out;
  out << "\"program\": " << json::quote(m.program) << ", \"command\": " << json::quote(m.command)
      << ",\n \"backend\": " << json::quote(m.backend)
      << ", \"compiler\": " << json::quote(m.compiler)
      << ", \"toolkit\": " << json::quote(m.toolkit) << ", \"commit\": " << json::quote(m.commit)
      << ",\n \"driver\": " << json::quote(m.driver) << ", \"clocks\": " << json::quote(m.clocks)
      << ", \"bandwidth\": " << json::quote(m.bandwidth_kind)
      << ", \"copy_gbs\": " << fixed(m.copy_gbs, 2)
      << ", \"datasheet_gbs\": " << fixed(m.datasheet_gbs, 0)
      << ", \"matrix_tflops\": " << fixed(m.matrix_tflops, 1)
      << ", \"matrix_source\": " << json::quote(m.matrix_source);
  for (const auto& [name, rate] : m.matrix_rates) {
    out << ", \"" << name << "_tflops\": " << fixed(rate, 3);
  }
  return out.str();
}

std::string Cases::run(const std::function<void()>& body) {
  std::string problem;
  if (!device_error_.empty() || stop_requested()) {
    ++num_left_out_;
    return device_error_.empty() ? "not run: out of time" : "not run: the device has failed";
  }
  try {
    body();
    return "";
  } catch (const InternalError& error) {
    problem = concat("WRONG: ", error.what());
  } catch (const OutOfMemory& error) {
    problem = concat("no memory: ", error.what());
  } catch (const CudaError& error) {
    problem = device_error_ = concat("FAILED: ", error.what());
  } catch (const std::exception& error) {
    problem = concat("FAILED: ", error.what());
  }
  ++num_failed_;
  return problem;
}

void Cases::finish() const {
  MEDUSA_CHECK_INTERNAL(num_failed_ + num_left_out_ == 0, num_failed_, " cases failed, ",
                        num_left_out_, " were not run",
                        device_error_.empty() ? "" : "; the device ", device_error_);
}

Report::Report(const std::string& program, const Common& common, Backend& backend)
    : common_(common),
      machine_(describe(program, common, backend)),
      baseline_us_(read_baseline(common.baseline)) {
  line("# " + program + "\n\n" + markdown(machine_) + "- " + std::to_string(common.samples) +
       " samples after " + std::to_string(common.warm_ups) + " warm-ups; " +
       (common.warm ? "one copy of the data, in the cache" : "data rotates, so that it is cold"));
}

void Report::line(const std::string& text) const {
  (common_.json ? std::cerr : std::cout) << text << std::endl;
}

void Report::note(const std::string& text) { line("- " + text); }

void Report::begin_table() {
  if (header_done_) return;
  line("\n| op | shape | dtype | median us | p25-p75 | MiB | GB/s | % " + machine_.bandwidth_kind +
       " peak | TFLOP/s | % peak | bound | vs baseline |\n"
       "|---|---|---|---|---|---|---|---|---|---|---|---|");
  header_done_ = true;
}

void Report::attempt(const std::string& op, const std::string& shape, const std::string& dtype,
                     const std::function<void()>& body) {
  const std::string problem = cases_.run(body);
  if (problem.empty()) return;
  begin_table();
  line(concat("| ", op, " | ", shape, " | ", dtype, " | ", problem, " | | | | | | | | |"));
  json_rows_.push_back(concat("  {\"op\": ", json::quote(op), ", \"shape\": ", json::quote(shape),
                              ", \"dtype\": ", json::quote(dtype),
                              ", \"error\": ", json::quote(problem), "}"));
}

void Report::add(const std::string& op, const std::string& shape, const std::string& dtype,
                 const Samples& seconds, int64_t num_bytes, int64_t flops) {
  begin_table();
  constexpr double kLaunchSeconds = 3e-6;  // a kernel's start and end, where its work is less
  const double time = seconds.median();
  const double gbs = 1e-9 * static_cast<double>(num_bytes) / time;
  const double tflops = 1e-12 * static_cast<double>(flops) / time;
  const double memory_s = 1e-9 * static_cast<double>(num_bytes) / machine_.copy_gbs;
  const double share = memory_s / time;
  std::string bound = "-", matrix_share = "-";
  if (const double rate = machine_.matrix_rate(dtype); rate > 0) {
    const double compute_s = 1e-12 * static_cast<double>(flops) / rate;
    bound = std::max(memory_s, compute_s) < kLaunchSeconds ? "launch"
            : memory_s >= compute_s                        ? "memory"
                                                           : "compute";
    if (flops > 0) matrix_share = fixed(100 * compute_s / time, 0);
  }
  std::string against = "-";
  const auto found = baseline_us_.find({op, shape, dtype});
  if (found != baseline_us_.end()) against = fixed(1e6 * time / found->second, 2) + " x";

  const std::string low = fixed(1e6 * seconds.quantile(0.25), 2);
  const std::string high = fixed(1e6 * seconds.quantile(0.75), 2);
  line(concat("| ", op, " | ", shape, " | ", dtype, " | ", fixed(1e6 * time, 2), " | ", low, "-",
              high, " | ", mib(num_bytes), " | ", fixed(gbs, 1), " | ", fixed(100 * share, 0),
              " | ", flops > 0 ? fixed(tflops, 2) : "-", " | ", matrix_share, " | ", bound, " | ",
              against, " |"));
  json_rows_.push_back(
      concat("  {\"op\": ", json::quote(op), ", \"shape\": ", json::quote(shape),
             ", \"dtype\": ", json::quote(dtype), ", \"median_us\": ", fixed(1e6 * time, 3),
             ", \"p25_us\": ", low, ", \"p75_us\": ", high, ", \"samples\": ", seconds.count(),
             ", \"bytes\": ", num_bytes, ", \"flops\": ", flops, ", \"gb_per_s\": ", fixed(gbs, 2),
             ", \"copy_share\": ", fixed(share, 4), ", \"tflop_per_s\": ", fixed(tflops, 3),
             ", \"bound\": ", json::quote(bound), "}"));
}

void Report::finish() {
  if (common_.json) {
    std::string rows;
    for (const std::string& row : json_rows_) rows += (rows.empty() ? "\n" : ",\n") + row;
    std::cout << "{" << json_members(machine_)
              << ",\n \"warm\": " << (common_.warm ? "true" : "false") << ", \"rows\": [" << rows
              << "\n ]}" << std::endl;
  }
  cases_.finish();
}

}  // namespace medusa::bench
