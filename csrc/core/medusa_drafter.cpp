// Medusa heads as drafters: only the last accepted node's hidden row is read. Their candidates fill
// a static tree, or each step grows a tree of its own (medusa/guesses.h). Source: Medusa,
// arXiv:2401.10774.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <memory>
#include <mutex>
#include <vector>

#include "core/head_runner.h"
#include "medusa/error.h"
#include "medusa/guesses.h"
#include "medusa/noise.h"
#include "medusa/resident.h"
#include "medusa/session.h"

namespace medusa {
namespace {

class MedusaDrafter final : public Drafter {
 public:
  MedusaDrafter(std::shared_ptr<const Model> model, const TreeSpec& tree)
      : heads_(std::move(model)), tree_(tree), ops_(*heads_.model().backend) {
    MEDUSA_CHECK_ARG(tree.depth() <= heads_.num_heads(), "medusa drafter: the tree is ",
                     tree.depth(), " deep, the model has ", heads_.num_heads(),
                     " heads; use a tree no deeper than the heads");
    most_ = std::min(heads_.vocab_size(), kMaxTreeNodes);
    for (int depth = 1; depth <= tree.depth(); ++depth) {
      MEDUSA_CHECK_ARG(tree.num_ranks(depth) <= most_, "medusa drafter: the tree uses rank ",
                       tree.num_ranks(depth) - 1, " at depth ", depth, ", allowed is below ",
                       most_);
      num_ranks_ = std::max(num_ranks_, tree.num_ranks(depth));
    }
  }

  int max_nodes() const override { return tree_.num_nodes(); }
  const TreeSpec* resident_tree() const override { return &tree_; }

  void draft_resident(Resident& resident, int batch) override {
    if (tree_.depth() == 0) return;
    const int width = std::min(most_, std::max(num_ranks_, kDrawnCandidates));
    const HeadRunner::Candidates found = heads_.run(resident.hidden(batch), tree_.depth(), width);
    TensorView token_map;
    const std::vector<int32_t>& ids = heads_.model().token_map;
    if (!ids.empty()) {
      const auto size = static_cast<int64_t>(ids.size());
      if (!token_map_) {
        token_map_ = ops_.allocate(size * 4);
        ops_.upload(token_map_->data(), ids.data(), size * 4);
      }
      token_map = TensorView(token_map_->data(), DType::i32, size);
    }
    resident.fill_tree(batch, found.ids, found.values, token_map);
  }

  void draft(std::span<const DraftInput> inputs, std::span<DraftTree> trees) override {
    const std::lock_guard lock(mutex_);
    std::vector<size_t> ready;
    std::vector<const float*> hidden;
    int depth = 0;
    bool sampled = false;
    for (size_t i = 0; i < inputs.size(); ++i) {
      if (!inputs[i].hidden || inputs[i].max_depth < 1 || inputs[i].max_nodes < 2) continue;
      ready.push_back(i);
      hidden.push_back(inputs[i].hidden);
      depth = std::max(depth, std::min(inputs[i].max_depth, tree_.depth()));
      sampled |= inputs[i].sampling->temperature > 0.0f;
    }
    if (ready.empty() || depth == 0) return;
    const int width =
        std::min(most_, sampled ? std::max(num_ranks_, kDrawnCandidates) : num_ranks_);
    heads_.read(hidden, depth, width);
    for (size_t row = 0; row < ready.size(); ++row) {
      fill(inputs[ready[row]], static_cast<int>(row), static_cast<int>(ready.size()), depth, width,
           trees[ready[row]]);
    }
  }

 private:
  // At temperature > 0, ranks candidates by log q + G with the noise that will choose the token at
  // that position.
  void couple(const DraftInput& input, int depth, int32_t* ids, float* values, int width) {
    const SamplingParams& sampling = *input.sampling;
    if (sampling.temperature <= 0.0f || sampling.acceptance == Acceptance::typical) return;
    const auto position =
        static_cast<uint32_t>(input.tokens.size()) - 1 + static_cast<uint32_t>(depth);
    std::vector<std::pair<float, int32_t>> ranked;
    for (int i = 0; i < width; ++i) {
      const uint32_t word =
          noise_word(sampling.seed, sampling.sample_index, position, static_cast<uint32_t>(ids[i]));
      ranked.emplace_back(values[i] / sampling.temperature + gumbel_from_bits(word), ids[i]);
    }
    std::stable_sort(ranked.begin(), ranked.end(),
                     [](const auto& a, const auto& b) { return a.first > b.first; });
    for (int i = 0; i < width; ++i) ids[i] = ranked[static_cast<size_t>(i)].second;
  }

  void fill(const DraftInput& input, int row, int batch, int depth, int width, DraftTree& tree) {
    for (int level = 1; level <= depth; ++level) {
      const auto offset = static_cast<size_t>(((level - 1) * batch + row) * width);
      couple(input, level, heads_.ids.data() + offset, heads_.values.data() + offset, width);
    }
    std::vector<int> node_of(static_cast<size_t>(tree_.num_nodes()), -1);
    node_of[0] = 0;
    const int max_depth = std::min(input.max_depth, depth);
    for (int i = 1; i < tree_.num_nodes() && tree.num_nodes() < input.max_nodes; ++i) {
      const int level = tree_.node_depth(i);
      const int parent = node_of[static_cast<size_t>(tree_.parent(i))];
      if (level > max_depth || parent < 0) continue;
      const auto at = static_cast<size_t>(((level - 1) * batch + row) * width + tree_.rank(i));
      node_of[static_cast<size_t>(i)] = tree.add(parent, heads_.ids[at]);
    }
  }

  HeadRunner heads_;
  TreeSpec tree_;
  Backend& ops_;
  int most_ = 0, num_ranks_ = 0;
  std::mutex mutex_;  // two sessions may hold one drafter by mistake; they shall only be slow
  std::unique_ptr<Buffer> token_map_;
};

class DynamicDrafter final : public Drafter {
 public:
  DynamicDrafter(std::shared_ptr<const Model> model, GuessModel guesses, int max_nodes)
      : heads_(std::move(model)), guesses_(std::move(guesses)), max_nodes_(max_nodes) {
    guesses_.check(heads_.num_heads());
    const int vocab_size = heads_.model().config.vocab_size;
    MEDUSA_CHECK_ARG(!guesses_.ngrams || guesses_.ngrams->max_token() < vocab_size,
                     "dynamic drafter: the n-grams hold token ", guesses_.ngrams->max_token(),
                     ", the vocabulary has ", vocab_size);
    MEDUSA_CHECK_ARG(max_nodes >= 1 && max_nodes <= kMaxTreeNodes, "dynamic drafter: max_nodes is ",
                     max_nodes, ", allowed is 1 to ", kMaxTreeNodes);
  }

  int max_nodes() const override { return max_nodes_; }

  void draft(std::span<const DraftInput> inputs, std::span<DraftTree> trees) override {
    const std::lock_guard lock(mutex_);
    std::vector<size_t> ready;
    std::vector<const float*> hidden;
    std::vector<GuessSources> sources(inputs.size());
    int depth = 0, width = 0;
    for (size_t i = 0; i < inputs.size(); ++i) {
      const DraftInput& input = inputs[i];
      if (!input.hidden || input.max_depth < 1 || input.max_nodes < 2) continue;
      const bool draws = input.sampling->temperature > 0.0f;
      // Typical acceptance takes what is likely enough, whatever the noise; and of the text's own
      // words a copied run would win too often.
      const bool typical = draws && input.sampling->acceptance == Acceptance::typical;
      sources[i].text = input.tokens;
      if (draws && !typical) sources[i].noise = input.sampling;
      sources[i].width = draws && !typical ? kDrawnCandidates : kGuessCandidates;
      if (!guesses_.chain.empty() && !typical) sources[i].told = look_up(input.tokens);
      if (text_fills(guesses_, sources[i].told, nodes(input), input.max_depth)) {
        grow(guesses_, sources[i], nodes(input), input.max_depth, trees[i]);
        continue;
      }
      ready.push_back(i);
      hidden.push_back(input.hidden);
      width = std::max(width, sources[i].width);
      // Below the root no path is longer than there are nodes.
      depth = std::max(depth, std::min({input.max_depth, heads_.num_heads(), nodes(input) - 1}));
    }
    if (ready.empty()) return;
    width = std::min(heads_.vocab_size(), width);
    heads_.read(hidden, depth, width);
    for (size_t row = 0; row < ready.size(); ++row) {
      GuessSources& from = sources[ready[row]];
      from.ids = heads_.ids.data() + row * static_cast<size_t>(width);
      from.logits = heads_.values.data() + row * static_cast<size_t>(width);
      from.stride = static_cast<int64_t>(ready.size()) * width;
      // Of its own: guesses for a text shall not depend on what other texts need.
      from.width = std::min(width, from.width);
      from.depth = depth;
      const DraftInput& input = inputs[ready[row]];
      grow(guesses_, from, nodes(input), input.max_depth, trees[ready[row]]);
    }
  }

 private:
  int nodes(const DraftInput& input) const { return std::min(input.max_nodes, max_nodes_); }

  HeadRunner heads_;
  GuessModel guesses_;
  int max_nodes_;
  std::mutex mutex_;
};

}  // namespace

std::shared_ptr<Drafter> make_medusa_drafter(std::shared_ptr<const Model> model,
                                             const TreeSpec& tree) {
  return std::make_shared<MedusaDrafter>(std::move(model), tree);
}

std::shared_ptr<Drafter> make_dynamic_drafter(std::shared_ptr<const Model> model,
                                              GuessModel guesses, int max_nodes) {
  return std::make_shared<DynamicDrafter>(std::move(model), std::move(guesses), max_nodes);
}

}  // namespace medusa
