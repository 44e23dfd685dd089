// bench_decode: what one decoding step costs on this machine, held against the bandwidth of its
// memory. See README.md for what each number means.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <iostream>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "core/json.h"
#include "decode_run.h"
#include "report.h"
#include "shapes.h"
#include "timed_backend.h"

namespace medusa::bench {
namespace {

constexpr int kPrefillTokens = 512;
constexpr int kPrefillSamples = 5;
constexpr int kRoom = kRepeatSteps * 8;  // tokens a text may grow by between two starts

struct Options {
  std::string file;  // "": random weights of `shape`
  NamedShape shape{};
  std::optional<DType> weights;  // in blocks, of `shape`; a file has its own
  int heads = 0;                 // -1: those of the model
  int head_vocab = 0;
  std::vector<int> contexts, batches, nodes;
  int max_tokens = 0;  // context x batch beyond this is left out
  int prefill_chunk = 512;
  bool prefill = true;
  bool parts = false;          // the time of each part, on the CPU
  bool even_if_wrong = false;  // time what the check of exactness refused, and say so
};

Options take_options(Arguments& args, Common& common) {
  const bool device = !common.on_cpu() && !common.emulated();
  constexpr int kMaxContext = 32768;
  Options o;
  o.file = args.positional();
  MEDUSA_CHECK_ARG(o.file.empty() != common.shapes.empty() && common.shapes.size() <= 1,
                   "give either a model file or one --shape, of ", kShapeNames);
  if (o.file.empty()) o.shape = find_shape(common.shapes[0]);
  const int rounds = common.quick ? 5 : 25;
  common.samples = args.count("--rounds", device ? common.samples : rounds, 1, 100000);
  common.warm_ups = device ? std::min(common.samples, 10) : 1;
  o.heads = args.count("--heads", !device ? 0 : o.file.empty() ? 4 : -1, 0, 16);
  o.head_vocab = args.count("--head-vocab", o.shape.vocab, 1, 1 << 24);
  o.contexts = device ? std::vector<int>{128, 1024, 4096, 16384} : std::vector<int>{128};
  o.batches = device ? std::vector<int>{1, 8} : std::vector<int>{1};
  o.nodes = device ? std::vector<int>{kPlain, 16, 32, 64}
                   : std::vector<int>{kPlain, 1, 2, 4, 8, 16, 32, 64};
  if (common.quick) {
    o.contexts = {common.tiny() ? 40 : 1024};
    o.batches = {1};
    o.nodes = device ? std::vector<int>{kPlain, 64} : std::vector<int>{kPlain, 1, 16};
    o.prefill = false;
  }
  o.contexts = args.counts("--contexts", o.contexts, 1, kMaxContext);
  o.batches = args.counts("--batches", o.batches, 1, 64);
  o.nodes = args.counts("--nodes", o.nodes, 0, kMaxTreeNodes);
  std::sort(o.nodes.begin(), o.nodes.end());  // plain first: the others are held against it
  if (const std::string name = args.text("--weights", ""); !name.empty()) {
    o.weights = parse_weight_dtype(name);
    MEDUSA_CHECK_ARG(o.file.empty(), "--weights is for --shape; a file has its own types");
  }
  o.max_tokens = args.count("--max-tokens", 32768, 1, 1 << 24);
  if (device) o.prefill_chunk = 2048;
  o.even_if_wrong = args.flag("--even-if-wrong");
  o.parts = args.flag("--parts");
  MEDUSA_CHECK_ARG(!o.parts || common.on_cpu(),
                   "--parts is for the CPU: a device runs a step as a whole");
  args.finish();
  return o;
}

std::shared_ptr<const Model> make_model(const Options& o, const Common& common,
                                        const std::shared_ptr<Backend>& backend) {
  if (!o.file.empty()) return load_model(o.file, common.dtypes[0], backend);
  ModelConfig config = shape_config(o.shape);
  config.heads.num_heads = o.heads;
  config.heads.num_layers = o.heads > 0 ? 1 : 0;
  config.heads.shared_lm_head = o.heads == 0;
  config.heads.head_vocab = o.heads > 0 ? std::min(o.head_vocab, config.vocab_size) : 0;
  return random_model(config, common.dtypes[0], 1, backend, o.weights);
}

// The type of most weights.
const char* weights_name(const Model& model) {
  return dtype_name(model.layers[0].gate_up->dtype());
}

// Bytes of weights that a plain step reads: an embedding that is not lm_head too gives one row,
// heads none.
int64_t streamed_bytes(const Model& model) {
  int64_t bytes = model.weight_bytes();
  if (model.lm_head) bytes -= model.embedding->num_bytes();
  if (model.draft_lm_head) bytes -= model.draft_lm_head->num_bytes();
  for (const Head& head : model.heads) {
    for (const auto& block : head.blocks) bytes -= block->num_bytes();
    for (const auto& bias : head.biases) bytes -= bias->num_bytes();
    if (head.lm_head) bytes -= head.lm_head->num_bytes();
  }
  return bytes;
}

// Those of the first `depth` heads, which a tree of that depth needs.
int64_t head_bytes(const Model& model, int depth) {
  int64_t bytes = 0;
  for (int i = 0; i < depth; ++i) {
    const Head& head = model.heads[static_cast<size_t>(i)];
    for (const auto& block : head.blocks) bytes += block->num_bytes();
    for (const auto& bias : head.biases) bytes += bias->num_bytes();
    bytes += head.lm_head ? head.lm_head->num_bytes() : model.draft_output().num_bytes();
  }
  return bytes;
}

// One kind of step: plain, or a tree of so many nodes.
struct Lane {
  int nodes = kPlain;
  std::shared_ptr<Stepper> stepper;
  std::shared_ptr<TestDrafter> guesses;  // null: heads draft, or nobody
  int64_t drafted_bytes = 0;
  Samples seconds, device_s, gap_s, cached, emitted;
  std::map<std::string, Samples> parts;
};

class DecodeBench {
 public:
  DecodeBench(const Options& options, const Common& common)
      : o_(options),
        common_(common),
        backend_(make_backend(common.backend)),
        timed_(options.parts ? std::make_shared<TimedBackend>(backend_) : nullptr),
        model_(make_model(options, common, timed_ ? timed_ : backend_)),
        machine_(describe("bench_decode", common, *backend_)),
        heads_(options.heads < 0 ? model_->config.heads.num_heads : options.heads),
        kv_bytes_(model_->kv_shape(1).page_bytes() / kPageTokens) {
    MEDUSA_CHECK_ARG(heads_ <= model_->config.heads.num_heads, "--heads ", heads_,
                     ": the model has ", model_->config.heads.num_heads);
  }

  void run() {
    SessionOptions session = session_options(64, 1);
    std::vector<std::shared_ptr<Drafter>> drafters;
    for (const int nodes : o_.nodes) {
      if (nodes > 1 && heads_ > 0) drafters.push_back(heads_drafter(nodes));
    }
    double accepted = 0;
    wrong_ = cases_.run([&] {
      accepted = check_exact(model_, session, o_.nodes, common_.quick ? 8 : 64, drafters);
    });
    header(accepted);
    if (wrong_.empty() || o_.even_if_wrong) {
      for (const int batch : o_.batches) {
        for (const int context : o_.contexts) {
          if (int64_t{batch} * context <= o_.max_tokens) measure(batch, context);
        }
      }
      if (o_.prefill) {
        const std::string problem = cases_.run([this] { prefill(); });
        if (!problem.empty()) line("\nPrefill: " + problem);
      }
    }
    if (common_.json) std::cout << json() << std::flush;
    cases_.finish();
  }

 private:
  SessionOptions session_options(int context, int batch) const {
    SessionOptions options;
    options.max_batch = batch;
    options.max_context = std::min(model_->config.max_context, context + kRoom);
    options.cache_tokens = int64_t{batch} * (context + kRoom);
    options.prefill_chunk = o_.prefill_chunk;
    return options;
  }

  TreeSpec tree(int nodes) const {
    TreeSpec tree = likely_tree(nodes, heads_, 9);
    MEDUSA_CHECK_ARG(tree.num_nodes() == nodes, "--nodes ", nodes, ": ", heads_,
                     " heads fill at most ", tree.num_nodes());
    return tree;
  }
  std::shared_ptr<Drafter> heads_drafter(int nodes) const {
    return make_medusa_drafter(model_, tree(nodes));
  }

  // All node counts in turn where the host computes: what else the machine does meanwhile falls on
  // all alike. A device is its own, and its memory is short: one after the other.
  void measure(int batch, int context) {
    plain_s_ = 0;
    if (common_.on_cpu()) {
      attempt(batch, context, o_.nodes);
    } else {
      for (const int nodes : o_.nodes) attempt(batch, context, {nodes});
    }
  }

  void attempt(int batch, int context, const std::vector<int>& nodes) {
    const std::string problem = cases_.run([&] { measure_lanes(batch, context, nodes); });
    if (problem.empty()) return;
    const std::string count = nodes.size() == 1 ? nodes_name(nodes[0]) : std::string("all");
    line(concat("| ", batch, " | ", context, " | ", count, " | ", problem, " | | | | | | | | |"));
    rows_.push_back(concat(
        "  {\"op\": \"decode\", \"shape\": ",
        json::quote(concat(name(), " batch ", batch, " context ", context, " nodes ", count)),
        ", \"dtype\": ", json::quote(weights_name(*model_)), ", \"error\": ", json::quote(problem),
        "}"));
  }

  static std::string nodes_name(int nodes) {
    return nodes == kPlain ? "plain" : std::to_string(nodes);
  }

  std::vector<Lane> make_lanes(int batch, int context, const std::vector<int>& node_counts) const {
    const SessionOptions options = session_options(context, batch);
    std::vector<Lane> lanes;
    const Lane* shared = nullptr;  // of trees of random guesses: one session serves all sizes
    lanes.reserve(node_counts.size());
    for (const int nodes : node_counts) {
      Lane lane;
      lane.nodes = nodes;
      std::shared_ptr<Drafter> drafter;
      if (nodes > 1 && heads_ > 0) {
        drafter = heads_drafter(nodes);
        lane.drafted_bytes = head_bytes(*model_, tree(nodes).depth());
      } else if (nodes != kPlain && shared) {
        lane.guesses = shared->guesses;
        lane.stepper = shared->stepper;
      } else if (nodes != kPlain) {
        lane.guesses = std::make_shared<TestDrafter>(model_->config.vocab_size);
        drafter = lane.guesses;
      }
      if (!lane.stepper) {
        lane.stepper = std::make_shared<Stepper>(model_, drafter, options, context, batch);
      }
      lanes.push_back(std::move(lane));
      if (lanes.back().guesses) shared = &lanes.back();
    }
    return lanes;
  }

  void measure_lanes(int batch, int context, const std::vector<int>& node_counts) {
    std::vector<Lane> lanes = make_lanes(batch, context, node_counts);
    std::vector<size_t> order(lanes.size());
    for (size_t i = 0; i < order.size(); ++i) order[i] = i;
    const std::unique_ptr<Bandwidth> bandwidth =
        common_.on_cpu() ? make_bandwidth(*backend_, common_) : nullptr;
    for (int round = -common_.warm_ups; round < common_.samples; ++round) {
      if (bandwidth) machine_.copy_gbs = std::max(machine_.copy_gbs, 1e-9 * bandwidth->sample());
      for (const size_t i : order) {
        Lane& lane = lanes[i];
        if (lane.guesses) lane.guesses->num_nodes = lane.nodes;
        if (timed_) timed_->take();
        const Stepper::Step step = lane.stepper->step();
        if (round < 0) continue;
        if (timed_) {
          double rest = step.seconds;
          for (const auto& [part, seconds] : timed_->take()) {
            lane.parts[part].add(seconds);
            rest -= seconds;
          }
          lane.parts["between ops"].add(rest);
        }
        lane.seconds.add(step.seconds);
        lane.device_s.add(step.device_s);
        lane.gap_s.add(step.gap_s);
        lane.cached.add(static_cast<double>(step.cached));
        lane.emitted.add(static_cast<double>(step.emitted));
      }
      std::rotate(order.begin(), order.begin() + 1, order.end());
    }
    for (const Lane& lane : lanes) add_row(lane, batch, context);
    for (const Lane& lane : lanes) add_parts(lane, context);
  }

  // A line below the table: milliseconds of each part.
  void add_parts(const Lane& lane, int context) const {
    std::map<std::string, double> medians;
    for (const auto& [part, seconds] : lane.parts) medians[part] = seconds.median();
    add_parts(concat(nodes_name(lane.nodes), " at ", context), medians);
  }
  void add_parts(const std::string& what, const std::map<std::string, double>& parts) const {
    std::string text;
    for (const auto& [part, seconds] : parts) {
      text += concat(text.empty() ? "" : "; ", part, " ", fixed(1e3 * seconds, 3));
    }
    if (!text.empty()) line(concat("\nms of ", what, ": ", text));
  }

  void add_row(const Lane& lane, int batch, int context) {
    const double time = lane.seconds.median();
    const int nodes = std::max(lane.nodes, 1);
    const auto kv = static_cast<double>(kv_bytes_) * (lane.cached.median() + batch * nodes);
    const double bytes = static_cast<double>(streamed_bytes(*model_) + lane.drafted_bytes) + kv;
    const double floor_s = bytes / (1e9 * machine_.copy_gbs);
    if (lane.nodes == kPlain) plain_s_ = time;
    const std::string ratio = plain_s_ > 0 ? fixed(time / plain_s_, 2) : "-";
    const double emitted = lane.emitted.mean();
    const double device_s = lane.device_s.median(), gap = lane.gap_s.median();
    const bool on_device = device_s > 0;
    const auto ms = [](double seconds) { return fixed(1e3 * seconds, 3); };
    const std::string low = ms(lane.seconds.quantile(0.25)), high = ms(lane.seconds.quantile(0.75));
    line(concat("| ", batch, " | ", context, " | ", nodes_name(lane.nodes),
                wrong_.empty() ? "" : " (inexact)", " | ", ms(time), " | ", low, "-", high, " | ",
                fixed(1e-9 * bytes, 3), " | ", ms(floor_s), " | ", fixed(100 * floor_s / time, 0),
                " | ", ratio, " | ", on_device ? fixed(1e6 * gap, 1) : std::string("-"), " | ",
                fixed(emitted / batch, 2), " | ", fixed(emitted / time, 1), " |"));
    rows_.push_back(concat(
        "  {\"op\": \"decode\", \"shape\": ",
        json::quote(concat(name(), " batch ", batch, " context ", context, " nodes ", lane.nodes)),
        ", \"dtype\": ", json::quote(weights_name(*model_)), ", \"batch\": ", batch,
        ", \"context\": ", context, ", \"nodes\": ", lane.nodes,
        ", \"median_us\": ", fixed(1e6 * time, 2), ", \"p25_ms\": ", low, ", \"p75_ms\": ", high,
        ", \"bytes\": ", fixed(bytes, 0), ", \"floor_ms\": ", ms(floor_s), ", \"floor_share\": ",
        fixed(floor_s / time, 4), ", \"device_us\": ", fixed(1e6 * device_s, 2),
        ", \"gap_us\": ", fixed(1e6 * gap, 2), ", \"tokens_per_step\": ", fixed(emitted / batch, 3),
        ", \"samples\": ", lane.seconds.count(), "}"));
  }

  void prefill() {
    Session session(model_, nullptr, session_options(kPrefillTokens, 1));
    const std::vector<int32_t> prompt = random_prompt(model_->config.vocab_size, kPrefillTokens, 4);
    Samples seconds;
    for (int i = 0; i <= kPrefillSamples; ++i) {
      int64_t steps = 0;
      if (timed_) timed_->take();
      const Clock::time_point start = Clock::now();
      generate(session, make_request(prompt, 1, false), steps);
      if (i > 0) seconds.add(seconds_since(start));
    }
    const double time = seconds.median();
    line(concat("\nPrefill of ", kPrefillTokens, " tokens: ", fixed(1e3 * time, 2), " ms, ",
                fixed(kPrefillTokens / time, 0), " tokens/s"));
    if (timed_) add_parts("the last prefill", timed_->take());
    prefill_ms_ = 1e3 * time;
  }

  std::string name() const {
    return o_.file.empty() ? std::string("random ") + o_.shape.name : o_.file;
  }

  void line(const std::string& text) const {
    (common_.json ? std::cerr : std::cout) << text << std::endl;
  }

  void header(double accepted) const {
    line(concat("# bench_decode: ", name(), ", ", weights_name(*model_), "\n\n", markdown(machine_),
                "- weights: ", mib(model_->weight_bytes()), " MiB resident, ",
                mib(streamed_bytes(*model_)), " read by a plain step, ",
                mib(head_bytes(*model_, heads_)), " more by ", heads_,
                " heads\n- KV cache: ", kv_bytes_, " bytes per token\n- ", common_.samples,
                " samples after ", common_.warm_ups, " warm-ups", "\n- exactness: ",
                wrong_.empty() ? concat("every tree gave the tokens of plain decoding, partly "
                                        "right guesses at ",
                                        fixed(accepted, 2), " tokens per step")
                               : wrong_,
                "\n- tokens per step below are those of random guesses: next to none is accepted, "
                "the step time is the figure\n"));
    line(
        "| batch | context | nodes | median ms | p25-p75 | GB | floor ms | % of floor | x plain | "
        "gap us | tokens/step | tokens/s |\n|---|---|---|---|---|---|---|---|---|---|---|---|");
  }

  std::string json() const {
    std::string rows;
    for (const std::string& row : rows_) rows += (rows.empty() ? "\n" : ",\n") + row;
    return concat("{", json_members(machine_), ",\n \"model\": ", json::quote(name()),
                  ", \"weight_bytes\": ", model_->weight_bytes(),
                  ", \"streamed_bytes\": ", streamed_bytes(*model_),
                  ", \"head_bytes\": ", head_bytes(*model_, heads_),
                  ", \"kv_bytes_per_token\": ", kv_bytes_,
                  ", \"exactness\": ", json::quote(wrong_.empty() ? "passed" : wrong_),
                  ", \"prefill_tokens\": ", kPrefillTokens,
                  ", \"prefill_ms\": ", fixed(prefill_ms_, 3), ", \"rows\": [", rows, "\n ]}\n");
  }

  const Options& o_;
  const Common& common_;
  std::shared_ptr<Backend> backend_;
  std::shared_ptr<TimedBackend> timed_;  // null without --parts
  std::shared_ptr<const Model> model_;
  Machine machine_;
  int heads_;
  int64_t kv_bytes_;
  double plain_s_ = 0, prefill_ms_ = 0;
  Cases cases_;
  std::string wrong_;  // what the check of exactness found
  std::vector<std::string> rows_;
};

void bench(Arguments& args, Common& common) {
  const Options options = take_options(args, common);
  DecodeBench(options, common).run();
}

}  // namespace
}  // namespace medusa::bench

int main(int argc, char** argv) {
  using namespace medusa::bench;
  const std::string usage = medusa::concat(
      "usage: bench_decode MODEL.safetensors | --shape NAME\n"
      "       [--contexts 128,...] [--batches 1,...] [--nodes 0,16,...] [--rounds N] [options]\n"
      "       [--heads N] [--head-vocab N] [--max-tokens N] [--even-if-wrong]\n"
      "       [--weights q8_0|q4_0|q4_1|q4_k] [--parts]\n  NAME: ",
      kShapeNames,
      "; nodes 0: plain decoding; heads 0: guesses are random\n"
      "  --parts: what each part of a step takes, with the waits that timing every op adds\n"
      "  --even-if-wrong: time what the check of exactness refused too; the table says so\n");
  return run_program("bench_decode", usage, argc, argv, bench);
}
