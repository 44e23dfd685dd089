// bench_decode: what one decoding step costs on this machine, held against the bandwidth of its
// memory. See benchmarks/README.md for what each number means.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstdio>
#include <iostream>
#include <map>
#include <memory>
#include <random>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "core/json.h"
#include "measure.h"
#include "medusa/error.h"
#include "medusa/session.h"
#include "shapes.h"

namespace medusa::bench {
namespace {

constexpr int kNodeCounts[] = {1, 2, 4, 8, 16, 32, 64};
constexpr int kMaxNodes = 64;
constexpr int kPlain = 0;           // stands for no drafter among the node counts
constexpr int kPromptTokens = 128;  // ahead of the timed steps
constexpr int kPrefillTokens = 512;
constexpr int kPrefillSamples = 5;
constexpr int kCheckTokens = 64;
constexpr int kRepeatSteps =
    256;  // a timed request starts anew after this many, so that its cache stays short
constexpr int64_t kArrayBytes = int64_t{512} << 20;

constexpr const char* kUsage =
    "usage: bench_decode MODEL.safetensors | --shape smollm2-135m|llama-1b|tiny\n"
    "       [--dtype bf16|f16|f32] [--threads N] [--isa generic|avx2|avx512] [--rounds N] "
    "[--json]\n";

struct Options {
  std::string model, shape;
  DType dtype = DType::bf16;
  BackendOptions backend;
  int rounds = 25;
  bool json = false;
};

int parse_count(const std::string& name, const std::string& text) {
  size_t used = 0;
  int value = 0;
  try {
    value = std::stoi(text, &used);
  } catch (const std::exception&) {
    used = 0;
  }
  MEDUSA_CHECK_ARG(used == text.size() && value >= 1 && value <= 100000, name, ": found \"", text,
                   "\", wanted a number from 1 to 100000");
  return value;
}

Options parse(const std::vector<std::string>& args) {
  Options options;
  for (size_t i = 0; i < args.size(); ++i) {
    const std::string& arg = args[i];
    const auto value = [&]() -> const std::string& {
      MEDUSA_CHECK_ARG(i + 1 < args.size(), arg, " needs a value");
      return args[++i];
    };
    if (arg == "--json") {
      options.json = true;
    } else if (arg == "--shape") {
      options.shape = value();
    } else if (arg == "--dtype") {
      options.dtype = parse_dtype(value());
    } else if (arg == "--threads") {
      options.backend.threads = parse_count(arg, value());
    } else if (arg == "--isa") {
      options.backend.isa = value();
    } else if (arg == "--rounds") {
      options.rounds = parse_count(arg, value());
    } else {
      MEDUSA_CHECK_ARG(!arg.starts_with('-'), "unknown option ", arg);
      MEDUSA_CHECK_ARG(options.model.empty(), "more than one model: ", options.model, ", ", arg);
      options.model = arg;
    }
  }
  MEDUSA_CHECK_ARG(options.model.empty() != options.shape.empty(),
                   "give either a model file or --shape");
  return options;
}

// Bytes of weights that a plain step reads: an embedding that is not lm_head too gives one row,
// heads none.
int64_t streamed_bytes(const Model& model) {
  int64_t bytes = model.weight_bytes();
  if (model.lm_head) bytes -= model.embedding->num_bytes();
  for (const Head& head : model.heads) {
    for (const auto& block : head.blocks) bytes -= block->num_bytes();
    for (const auto& bias : head.biases) bytes -= bias->num_bytes();
    if (head.lm_head) bytes -= head.lm_head->num_bytes();
  }
  return bytes;
}

// Trees of a set size. The first guess at each depth continues `script` (if any), wrong at every
// fifth position; the others are random, hung below random nodes.
class TestDrafter : public Drafter {
 public:
  explicit TestDrafter(int vocab_size) : token_(0, vocab_size - 1) {}

  int num_nodes = kMaxNodes;
  std::vector<int32_t> script;  // prompt and continuation

  int max_nodes() const override { return kMaxNodes; }

  void draft(std::span<const DraftInput> inputs, std::span<DraftTree> trees) override {
    for (size_t i = 0; i < inputs.size(); ++i) {
      const DraftInput& input = inputs[i];
      DraftTree& tree = trees[i];
      tree.reset(input.tokens.back());
      const int wanted = input.max_depth > 0 ? std::min(num_nodes, input.max_nodes) : 1;
      const int most_depth = std::min(input.max_depth, 5);
      int node = 0;
      for (size_t at = input.tokens.size(); at < script.size(); ++at) {
        if (tree.num_nodes() >= wanted || tree.depth(node) >= most_depth || at % 5 == 0) break;
        node = tree.add(node, script[at]);
      }
      // Bounded: a tiny vocabulary may not hold that many distinct siblings.
      for (int tries = 64 * kMaxNodes; tree.num_nodes() < wanted && tries > 0; --tries) {
        const int parent = std::uniform_int_distribution<int>(0, tree.num_nodes() - 1)(random_);
        if (tree.depth(parent) < most_depth) tree.add(parent, token_(random_));
      }
    }
  }

 private:
  std::mt19937 random_{1};
  std::uniform_int_distribution<int32_t> token_;
};

std::vector<int32_t> random_prompt(int vocab_size, int length, uint32_t seed) {
  std::mt19937 random(seed);
  std::uniform_int_distribution<int32_t> token(0, vocab_size - 1);
  std::vector<int32_t> prompt(static_cast<size_t>(length));
  for (int32_t& id : prompt) id = token(random);
  return prompt;
}

Request make_request(std::vector<int32_t> tokens, int max_new_tokens) {
  Request request;
  request.tokens = std::move(tokens);
  request.max_new_tokens = max_new_tokens;
  request.reuse_prefix = false;
  return request;
}

std::vector<int32_t> generate(Session& session, Request request, int64_t& num_steps) {
  std::vector<int32_t> out;
  session.submit(std::move(request));
  while (!session.idle()) {
    for (const Event& event : session.step()) {
      out.insert(out.end(), event.tokens.begin(), event.tokens.end());
      if (event.finish != Finish::none) num_steps = event.stats.steps;
    }
  }
  return out;
}

// A run without end whose single steps can be timed.
class Stepper {
 public:
  Stepper(Session& session, int vocab_size)
      : session_(session), prompt_(random_prompt(vocab_size, kPromptTokens, 2)) {}

  double seconds_of_step() {
    if (steps_left_ == 0) restart();
    --steps_left_;
    const Clock::time_point start = Clock::now();
    session_.step();
    return seconds_since(start);
  }

 private:
  void restart() {
    if (request_ != 0) session_.cancel(request_);
    request_ = session_.submit(make_request(prompt_, 0));
    session_.step();  // the prompt and the first token
    steps_left_ = kRepeatSteps;
  }

  Session& session_;
  std::vector<int32_t> prompt_;
  int64_t request_ = 0;
  int steps_left_ = 0;
};

struct Results {
  std::string model, dtype, backend;
  int64_t weight_bytes = 0, streamed = 0, kv_bytes_per_token = 0, cache_bytes = 0;
  double checked_tokens_per_step = 0;
  Samples bandwidth, prefill;    // bytes per second; seconds
  std::map<int, Samples> steps;  // by node count, seconds

  const Samples& plain() const { return steps.at(kPlain); }
  double best_bandwidth() const { return bandwidth.quantile(1.0); }
  double share(double seconds) const {
    return static_cast<double>(streamed) / best_bandwidth() / seconds;
  }
};

// Refuses to time what is wrong: trees must give the tokens of plain decoding.
double check_exact(const std::shared_ptr<const Model>& model, const SessionOptions& options) {
  const int vocab_size = model->config.vocab_size;
  const std::vector<int32_t> prompt = random_prompt(vocab_size, 32, 3);
  Session plain(model, nullptr, options);
  int64_t steps = 0, tree_steps = 0, tree_tokens = 0;
  const std::vector<int32_t> wanted = generate(plain, make_request(prompt, kCheckTokens), steps);

  auto drafter = std::make_shared<TestDrafter>(vocab_size);
  drafter->script = prompt;
  drafter->script.insert(drafter->script.end(), wanted.begin(), wanted.end());
  Session trees(model, drafter, options);
  for (const int num_nodes : kNodeCounts) {
    drafter->num_nodes = num_nodes;
    const std::vector<int32_t> found = generate(trees, make_request(prompt, kCheckTokens), steps);
    for (size_t i = 0; i < std::max(found.size(), wanted.size()); ++i) {
      MEDUSA_CHECK_INTERNAL(i < found.size() && i < wanted.size() && found[i] == wanted[i],
                            "a tree of ", num_nodes, " nodes changed the output at token ", i,
                            "; nothing was timed");
    }
    tree_steps += steps;
    tree_tokens += static_cast<int64_t>(found.size());
  }
  MEDUSA_CHECK_INTERNAL(tree_tokens > tree_steps, "the trees' guesses were never accepted");
  return static_cast<double>(tree_tokens) / static_cast<double>(tree_steps);
}

Results measure(const Options& options) {
  const std::shared_ptr<Backend> backend = make_backend(options.backend);
  const std::shared_ptr<const Model> model =
      options.shape.empty() ? load_model(options.model, options.dtype, backend)
                            : random_model(shape_config(options.shape), options.dtype, 1, backend);
  const int vocab_size = model->config.vocab_size;
  SessionOptions session_options;
  session_options.max_batch = 1;
  session_options.max_context = std::min(model->config.max_context, 2048);
  MEDUSA_CHECK_ARG(session_options.max_context > kPrefillTokens, "the model's max_context is ",
                   session_options.max_context, ", wanted more than ", kPrefillTokens);

  Results results;
  results.model = options.shape.empty() ? options.model : "random " + options.shape;
  results.dtype = dtype_name(model->dtype);
  results.backend = backend->name() + " (" + backend->detail() + ")";
  results.weight_bytes = model->weight_bytes();
  results.streamed = streamed_bytes(*model);
  results.kv_bytes_per_token = model->kv_shape(1).page_bytes() / kPageTokens;
  results.checked_tokens_per_step = check_exact(model, session_options);

  auto drafter = std::make_shared<TestDrafter>(vocab_size);
  Session plain(model, nullptr, session_options), trees(model, drafter, session_options);
  results.cache_bytes = plain.stats().cache_bytes;
  Stepper plain_stepper(plain, vocab_size), tree_stepper(trees, vocab_size);
  ReadBandwidth bandwidth(backend->threads(), kArrayBytes);

  // One of each in turn, from another start in every round: what else the machine does meanwhile,
  // and what a step leaves in the caches, falls on all alike. The first round warms up.
  std::vector<int> order{kPlain};
  order.insert(order.end(), std::begin(kNodeCounts), std::end(kNodeCounts));
  for (int round = 0; round <= options.rounds; ++round) {
    const double bytes_per_s = bandwidth.sample();
    if (round > 0) results.bandwidth.add(bytes_per_s);
    for (const int num_nodes : order) {
      drafter->num_nodes = num_nodes;
      Stepper& stepper = num_nodes == kPlain ? plain_stepper : tree_stepper;
      const double seconds = stepper.seconds_of_step();
      if (round > 0) results.steps[num_nodes].add(seconds);
    }
    std::rotate(order.begin(), order.begin() + 1, order.end());
  }

  Session prefill(model, nullptr, session_options);
  const std::vector<int32_t> prompt = random_prompt(vocab_size, kPrefillTokens, 4);
  for (int i = 0; i < kPrefillSamples; ++i) {
    int64_t steps = 0;
    const Clock::time_point start = Clock::now();
    generate(prefill, make_request(prompt, 1), steps);
    results.prefill.add(seconds_since(start));
  }
  MEDUSA_CHECK_INTERNAL(bandwidth.check() > 0, "the array was not read");
  return results;
}

std::string fixed(double value, int digits) {
  char text[64];
  std::snprintf(text, sizeof text, "%.*f", digits, value);
  return text;
}

std::string row(const std::string& what, const Samples& samples, double scale, int digits,
                const std::string& note) {
  return concat("| ", what, " | ", fixed(scale * samples.median(), digits), " | ",
                fixed(scale * samples.quantile(0.25), digits), "-",
                fixed(scale * samples.quantile(0.75), digits), " | ", note, " |\n");
}

std::string mib(int64_t bytes) { return fixed(static_cast<double>(bytes) / (1 << 20), 1) + " MiB"; }

std::string markdown(const Results& r) {
  const auto percent = [&](double seconds) { return fixed(100 * r.share(seconds), 0) + " %"; };
  std::ostringstream out;
  out << "# bench_decode: " << r.model << ", " << r.dtype << "\n\n"
      << "- backend: " << r.backend << "\n"
      << "- weights: " << mib(r.weight_bytes) << " resident, " << mib(r.streamed)
      << " read by a plain step\n"
      << "- KV cache: " << r.kv_bytes_per_token << " bytes per token, " << mib(r.cache_bytes)
      << " reserved\n"
      << "- read bandwidth: " << fixed(r.best_bandwidth() * 1e-9, 2) << " GB/s (best of "
      << r.bandwidth.count() << " passes over " << mib(kArrayBytes) << ")\n"
      << "- exactness: trees of every size gave the tokens of plain decoding, at "
      << fixed(r.checked_tokens_per_step, 2) << " tokens per step\n\n"
      << "| what | median | p25-p75 | note |\n|---|---|---|---|\n"
      << row("plain decoding, ms/token", r.plain(), 1e3, 2,
             fixed(1.0 / r.plain().median(), 1) + " tokens/s, " + percent(r.plain().median()) +
                 " of the read bandwidth; the best step " + percent(r.plain().best()));
  const double one = r.steps.at(1).median();
  for (const auto& [num_nodes, samples] : r.steps) {
    if (num_nodes == kPlain) continue;
    out << row(
        "step of " + std::to_string(num_nodes) + (num_nodes == 1 ? " node, ms" : " nodes, ms"),
        samples, 1e3, 2, fixed(samples.median() / one, 2) + " x 1 node");
  }
  out << row("prefill of " + std::to_string(kPrefillTokens) + " tokens, s", r.prefill, 1.0, 3,
             fixed(kPrefillTokens / r.prefill.median(), 0) + " tokens/s");
  return out.str();
}

std::string json_text(const Results& r) {
  const auto value = [](double x) { return fixed(x, 6); };
  std::ostringstream out;
  out << "{\"model\": " << json::quote(r.model) << ", \"dtype\": " << json::quote(r.dtype)
      << ", \"backend\": " << json::quote(r.backend) << ", \"weight_bytes\": " << r.weight_bytes
      << ", \"streamed_bytes\": " << r.streamed
      << ", \"kv_bytes_per_token\": " << r.kv_bytes_per_token
      << ", \"cache_bytes\": " << r.cache_bytes
      << ", \"read_bandwidth_gb_per_s\": " << value(r.best_bandwidth() * 1e-9)
      << ", \"plain_ms\": " << value(1e3 * r.plain().median())
      << ", \"bandwidth_share\": " << value(r.share(r.plain().median()))
      << ", \"bandwidth_share_best\": " << value(r.share(r.plain().best())) << ", \"step_ms\": {";
  const char* separator = "";
  for (const auto& [num_nodes, samples] : r.steps) {
    if (num_nodes == kPlain) continue;
    out << separator << "\"" << num_nodes << "\": " << value(1e3 * samples.median());
    separator = ", ";
  }
  out << "}, \"prefill_tokens\": " << kPrefillTokens
      << ", \"prefill_s\": " << value(r.prefill.median()) << ", \"rounds\": " << r.plain().count()
      << "}\n";
  return out.str();
}

int run(const std::vector<std::string>& args) {
  try {
    const bool help = std::any_of(args.begin(), args.end(), [](const std::string& arg) {
      return arg == "--help" || arg == "-h";
    });
    if (args.empty() || help) {
      (help ? std::cout : std::cerr) << kUsage;
      return help ? 0 : 2;
    }
    const Options options = parse(args);
    const Results results = measure(options);
    std::cout << (options.json ? json_text(results) : markdown(results));
    return 0;
  } catch (const ArgumentError& error) {
    std::cerr << "bench_decode: " << error.what() << "\n";
    return 2;
  } catch (const std::exception& error) {
    std::cerr << "bench_decode: " << error.what() << "\n";
    return 1;
  }
}

}  // namespace
}  // namespace medusa::bench

int main(int argc, char** argv) {
  return medusa::bench::run(std::vector<std::string>(argv + 1, argv + argc));
}
