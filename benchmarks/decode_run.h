// Decoding on random tokens in single steps that can be timed, and the check that trees change
// nothing: what bench_decode is made of.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <utility>
#include <vector>

#include "data.h"
#include "measure.h"
#include "medusa/session.h"

namespace medusa::bench {

constexpr int kPlain = 0;  // stands for no drafter among the node counts
constexpr int kRepeatSteps =
    256;  // a timed text starts anew after this many, so that it stays short

// Trees of a set size. The first guess at each depth continues `script` (if any), wrong at every
// fifth position; the others are random, hung below random nodes.
class TestDrafter : public Drafter {
 public:
  explicit TestDrafter(int vocab_size) : vocab_size_(vocab_size) {}

  int num_nodes = 1;
  std::vector<int32_t> script;  // prompt and continuation

  int max_nodes() const override { return kMaxTreeNodes; }

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
      grow_tree(tree, wanted, most_depth, vocab_size_, random_);
    }
  }

 private:
  std::mt19937 random_{1};
  int vocab_size_;
};

// A static tree of this many nodes, deep and wide as trees for Medusa heads are: the likeliest
// paths where the guess of rank r at any depth is right with probability 0.6 * 0.5^r.
inline TreeSpec likely_tree(int num_nodes, int max_depth, int max_rank) {
  std::vector<std::vector<int>> paths;
  std::multimap<double, std::vector<int>, std::greater<>> next;
  const auto open = [&](double chance, std::vector<int> path) {
    next.emplace(chance, std::move(path));
  };
  if (max_depth > 0) open(0.6, {0});
  while (static_cast<int>(paths.size()) + 1 < num_nodes && !next.empty()) {
    const auto [chance, path] = *next.begin();
    next.erase(next.begin());
    paths.push_back(path);
    std::vector<int> sibling = path, child = path;
    if (++sibling.back() <= max_rank) open(chance * 0.5, std::move(sibling));
    child.push_back(0);
    if (static_cast<int>(child.size()) <= max_depth) open(chance * 0.6, std::move(child));
  }
  return TreeSpec::from_paths(paths);
}

inline std::vector<int32_t> random_prompt(int vocab_size, int length, uint32_t seed) {
  std::mt19937 random(seed);
  std::uniform_int_distribution<int32_t> token(0, vocab_size - 1);
  std::vector<int32_t> prompt(static_cast<size_t>(length));
  for (int32_t& id : prompt) id = token(random);
  return prompt;
}

inline Request make_request(std::vector<int32_t> tokens, int max_new_tokens, bool reuse) {
  Request request;
  request.tokens = std::move(tokens);
  request.max_new_tokens = max_new_tokens;
  request.reuse_prefix = reuse;
  return request;
}

inline std::vector<int32_t> generate(Session& session, Request request, int64_t& num_steps) {
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

// Refuses to time what is wrong: every drafter must give the tokens of plain decoding. Returns the
// tokens that a step of the trees with partly right guesses emitted.
inline double check_exact(const std::shared_ptr<const Model>& model, const SessionOptions& options,
                          const std::vector<int>& node_counts, int num_tokens,
                          const std::vector<std::shared_ptr<Drafter>>& others) {
  const int vocab_size = model->config.vocab_size;
  const std::vector<int32_t> prompt = random_prompt(vocab_size, 32, 3);
  int64_t steps = 0, tree_steps = 0, tree_tokens = 0;
  std::vector<int32_t> wanted;
  {
    Session plain(model, nullptr, options);
    wanted = generate(plain, make_request(prompt, num_tokens, false), steps);
  }
  const auto compare = [&](Session& session, int num_nodes) {
    const std::vector<int32_t> found =
        generate(session, make_request(prompt, num_tokens, false), steps);
    for (size_t i = 0; i < std::max(found.size(), wanted.size()); ++i) {
      MEDUSA_CHECK_INTERNAL(i < found.size() && i < wanted.size() && found[i] == wanted[i],
                            "a tree of ", num_nodes, " nodes changed the output at token ", i,
                            "; nothing was timed");
    }
    tree_tokens += static_cast<int64_t>(found.size());
    tree_steps += steps;
  };
  for (const auto& drafter : others) {
    Session session(model, drafter, options);
    compare(session, drafter->max_nodes());
  }
  tree_tokens = tree_steps = 0;
  auto drafter = std::make_shared<TestDrafter>(vocab_size);
  drafter->script = prompt;
  drafter->script.insert(drafter->script.end(), wanted.begin(), wanted.end());
  Session trees(model, drafter, options);
  for (const int num_nodes : node_counts) {
    if (num_nodes == kPlain) continue;
    drafter->num_nodes = num_nodes;
    compare(trees, num_nodes);
  }
  MEDUSA_CHECK_INTERNAL(tree_tokens > tree_steps || tree_steps == 0,
                        "the trees' guesses were never accepted");
  return tree_steps == 0 ? 1.0 : static_cast<double>(tree_tokens) / static_cast<double>(tree_steps);
}

// A batch of texts without end whose single steps can be timed.
class Stepper {
 public:
  Stepper(const std::shared_ptr<const Model>& model, std::shared_ptr<Drafter> drafter,
          const SessionOptions& options, int context, int batch)
      : session_(model, std::move(drafter), options) {
    for (int b = 0; b < batch; ++b) {
      prompts_.push_back(
          random_prompt(model->config.vocab_size, context, static_cast<uint32_t>(100 + b)));
    }
  }

  struct Step {
    double seconds = 0;
    double device_s = 0, gap_s = 0;   // by the device's clock, where no host is in the loop
    int64_t cached = 0, emitted = 0;  // tokens, of all texts
  };

  Step step() {
    if (stop_requested()) throw std::runtime_error("out of time");
    if (steps_left_ == 0) restart();
    --steps_left_;
    Step out;
    for (const auto& [id, tokens] : tokens_) out.cached += tokens;
    const Clock::time_point start = Clock::now();
    const std::vector<Event> events = session_.step();
    out.seconds = seconds_since(start);
    const SessionStats stats = session_.stats();
    out.device_s = stats.device_step_s;
    out.gap_s = stats.device_gap_s;
    out.emitted = count(events);
    return out;
  }

  const Session& session() const { return session_; }

 private:
  int64_t count(const std::vector<Event>& events) {
    int64_t emitted = 0;
    for (const Event& event : events) {
      const auto found = tokens_.find(event.request);
      if (found == tokens_.end()) continue;
      MEDUSA_CHECK_INTERNAL(event.finish == Finish::none, "a timed text ended");
      found->second += static_cast<int64_t>(event.tokens.size());
      emitted += static_cast<int64_t>(event.tokens.size());
    }
    return emitted;
  }

  // From prompts to a steady state: all texts decode, and what a device records is recorded.
  void restart() {
    constexpr int kSettle = 4;
    for (const auto& [id, tokens] : tokens_) session_.cancel(id);
    tokens_.clear();
    for (const std::vector<int32_t>& prompt : prompts_) {
      const int64_t id = session_.submit(make_request(prompt, 0, true));
      tokens_[id] = static_cast<int64_t>(prompt.size());
    }
    const auto waiting = [&] {
      const auto length = static_cast<int64_t>(prompts_[0].size());
      return std::any_of(tokens_.begin(), tokens_.end(),
                         [&](const auto& text) { return text.second == length; });
    };
    while (waiting()) {
      if (stop_requested()) throw std::runtime_error("out of time");
      count(session_.step());
    }
    for (int i = 0; i < kSettle; ++i) count(session_.step());
    steps_left_ = kRepeatSteps;
  }

  Session session_;
  std::vector<std::vector<int32_t>> prompts_;
  std::map<int64_t, int64_t> tokens_;  // of each request
  int steps_left_ = 0;
};

}  // namespace medusa::bench
