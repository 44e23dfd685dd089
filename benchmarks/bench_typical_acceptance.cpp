// bench_typical_acceptance: verify(), the walk through a tree by the logits of its nodes, in each
// way of choosing; typical acceptance is one of them. The call waits for its result, so the times
// hold the way to the device and back. See README.md.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "cost.h"
#include "data.h"
#include "report.h"
#include "shapes.h"

namespace medusa::bench {
namespace {

struct Mode {
  std::string name;
  SamplingParams sampling;
};

constexpr const char* kModeNames = "greedy, temperature, hot, top-k, top-p, typical";

// Those that `wanted` names, by the first word of theirs; all if it names none.
std::vector<Mode> modes(const std::vector<std::string>& wanted) {
  SamplingParams greedy, warm, hot, top_k, top_p, typical;
  warm.temperature = top_k.temperature = top_p.temperature = 0.8f;
  hot.temperature = 1.5f;
  typical.temperature = 0.7f;
  warm.seed = hot.seed = top_k.seed = top_p.seed = typical.seed = 11;
  top_k.top_k = 50;
  top_p.top_p = 0.95;
  typical.acceptance = Acceptance::typical;
  std::vector<Mode> modes{{"greedy", greedy},  {"temperature 0.8", warm}, {"hot 1.5", hot},
                          {"top-k 50", top_k}, {"top-p 0.95", top_p},     {"typical", typical}};
  std::erase_if(modes, [&](const Mode& mode) {
    const std::string word = mode.name.substr(0, mode.name.find(' '));
    return !wanted.empty() && std::find(wanted.begin(), wanted.end(), word) == wanted.end();
  });
  return modes;
}

// One tree and its logits, on the backend under test and on the CPU.
class Judge {
 public:
  Judge(Backend& backend, const TensorView& logits, const SamplingParams& sampling)
      : backend_(backend), logits_(logits), sampling_(sampling) {}

  Accepted walk(const DraftTree& tree) const {
    Accepted accepted;
    const std::vector<int32_t> text{tree.token(0)};
    const VerifyItem item{&tree, 0, &sampling_, text, {}, 1 << 20, &accepted};
    backend_.verify(logits_, {&item, 1});
    return accepted;
  }

 private:
  Backend& backend_;
  TensorView logits_;
  const SamplingParams& sampling_;
};

// A tree with a path of `depth` right guesses among wrong ones.
DraftTree make_tree(const Judge& judge, int num_nodes, int depth, int vocab_size) {
  std::mt19937 random(5);
  DraftTree tree(1);
  for (int level = 0; level < depth; ++level) {
    grow_tree(tree, 1 + num_nodes * level / (depth + 1), depth + 1, vocab_size, random);
    const Accepted accepted = judge.walk(tree);
    if (tree.num_nodes() < num_nodes) tree.add(accepted.path.back(), accepted.tokens.back());
  }
  grow_tree(tree, num_nodes, depth + 1, vocab_size, random);
  return tree;
}

// Eight ids of each row far above the rest, as the logits of trained models have them.
void raise_some(const HostArray& values, int num_nodes, int vocab_size) {
  std::mt19937 random(7);
  auto* logits = static_cast<float*>(values.data());
  for (int node = 0; node < num_nodes; ++node, logits += vocab_size) {
    for (int i = 0; i < 8; ++i) {
      logits[random() % static_cast<uint32_t>(vocab_size)] = 18.0f - 1.2f * static_cast<float>(i);
    }
  }
}

void run(const Common& common, Backend& backend, Backend& cpu, const std::vector<Mode>& modes,
         int num_nodes, int vocab_size, bool peaked, Report& report) {
  constexpr int kDepth = 3;
  NormalValues normal(2);
  const int64_t count = int64_t{num_nodes} * vocab_size;
  const HostArray values(normal, DType::f32, count, 2.0f);
  if (peaked) raise_some(values, num_nodes, vocab_size);
  const TensorView shape(values.data(), DType::f32, num_nodes, vocab_size);
  const DeviceArray host(cpu, shape, values.data());
  std::vector<std::unique_ptr<DeviceArray>> copies;
  for (int i = 0; i < cold_copies(common, count * 4); ++i) {
    copies.push_back(std::make_unique<DeviceArray>(backend, shape, values.data()));
  }
  const auto run_mode = [&](const std::string& text, const SamplingParams& sampling) {
    const Judge wanted(cpu, host.view(), sampling);
    const DraftTree tree = make_tree(wanted, num_nodes, kDepth, vocab_size);
    const Accepted want = wanted.walk(tree);
    const Accepted found = Judge(backend, copies.back()->view(), sampling).walk(tree);
    MEDUSA_CHECK_INTERNAL(found.path == want.path && found.tokens == want.tokens, "verify ", text,
                          ": accepted ", found.path.size(), " nodes, the CPU ", want.path.size(),
                          ", or other tokens; nothing was timed");
    const Samples seconds = time_op(backend, common, true, [&](int i) {
      const DeviceArray& logits = *copies[static_cast<size_t>(i) % copies.size()];
      Judge(backend, logits.view(), sampling).walk(tree);
    });
    const Cost cost = verify_cost(num_nodes, vocab_size);
    report.add("verify", text, "f32", seconds, cost.num_bytes, cost.flops);
  };
  for (const Mode& mode : modes) {
    const std::string text =
        concat(mode.name, peaked ? ", peaked, " : ", ", num_nodes, " x ", vocab_size);
    report.attempt("verify", text, "f32", [&] { run_mode(text, mode.sampling); });
  }
}

void bench(Arguments& args, Common& common) {
  const bool tiny = common.tiny();
  const int nodes = args.count("--nodes", tiny ? 16 : 64, 1, kMaxTreeNodes);
  const std::vector<int> vocabs = args.counts(
      "--vocab", tiny ? std::vector<int>{1000} : std::vector<int>{32000, 128256}, 64, 1 << 24);
  const std::vector<std::string> names = args.texts("--mode");
  const std::vector<Mode> wanted = modes(names);
  MEDUSA_CHECK_ARG(names.empty() || wanted.size() == names.size(), "--mode: wanted some of ",
                   kModeNames, ", each once");
  const bool peaked = args.flag("--peaked");
  args.finish();
  find_shapes(common.shapes);
  const std::shared_ptr<Backend> backend = make_backend(common.backend), cpu = make_backend({});
  Report report("bench_typical_acceptance", common, *backend);
  for (const int vocab : vocabs) {
    report.attempt("verify", concat(nodes, " x ", vocab), "f32",
                   [&] { run(common, *backend, *cpu, wanted, nodes, vocab, peaked, report); });
  }
  report.finish();
}

}  // namespace
}  // namespace medusa::bench

int main(int argc, char** argv) {
  using namespace medusa::bench;
  const std::string usage = medusa::concat(
      "usage: bench_typical_acceptance [--shape tiny] [--mode MODE,...] [--nodes N]\n"
      "       [--vocab 32000,...] [--peaked] [options]\n  MODE: ",
      kModeNames,
      "\n  --peaked: eight logits of each node stand out, as those of trained models do\n");
  return run_program("bench_typical_acceptance", usage, argc, argv, bench);
}
