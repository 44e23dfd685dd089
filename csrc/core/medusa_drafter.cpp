// Medusa heads as a drafter: only the last accepted node's hidden row is read, every head's
// candidates fill a static tree, and the text so far may take part. Source: Medusa,
// arXiv:2401.10774.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <vector>

#include "medusa/error.h"
#include "medusa/lookup.h"
#include "medusa/noise.h"
#include "medusa/resident.h"
#include "medusa/session.h"

namespace medusa {
namespace {

// Candidates that the noise may reorder at temperature > 0.
constexpr int kCoupledCandidates = 48;
constexpr int64_t kRankedAtOnce = 64;  // rows of rank(), so that their logits stay small

// Tokens that a head chooses among.
int num_ranked(const ModelConfig& config) {
  return config.heads.head_vocab > 0 ? config.heads.head_vocab : config.vocab_size;
}

class MedusaDrafter final : public Drafter {
 public:
  MedusaDrafter(std::shared_ptr<const Model> model, const TreeSpec& tree, const GuessValues& values)
      : model_(std::move(model)), tree_(tree), ops_(*model_->backend), lookup_(values.lookup) {
    const HeadsConfig& heads = model_->config.heads;
    MEDUSA_CHECK_ARG(heads.num_heads > 0, "medusa drafter: the model has no heads");
    MEDUSA_CHECK_ARG(tree.depth() <= heads.num_heads, "medusa drafter: the tree is ", tree.depth(),
                     " deep, the model has ", heads.num_heads,
                     " heads; use a tree no deeper than the heads");
    const Head& first = model_->heads.front();
    for (const Head& head : model_->heads) {
      bool same = !head.lm_head || head.lm_head->dtype() == first.lm_head->dtype();
      for (const auto& block : head.blocks) same &= block->dtype() == first.blocks[0]->dtype();
      MEDUSA_CHECK_ARG(same, "medusa drafter: the heads are stored in different types");
    }
    head_vocab_ = num_ranked(model_->config);
    for (int depth = 1; depth <= tree.depth(); ++depth) {
      MEDUSA_CHECK_ARG(tree.num_ranks(depth) <= std::min(head_vocab_, kMaxTreeNodes),
                       "medusa drafter: the tree uses rank ", tree.num_ranks(depth) - 1,
                       " at depth ", depth, ", allowed is below ",
                       std::min(head_vocab_, kMaxTreeNodes));
      num_ranks_ = std::max(num_ranks_, tree.num_ranks(depth));
    }
    order_nodes(values);
  }

  int max_nodes() const override { return tree_.num_nodes(); }
  const TreeSpec* resident_tree() const override { return lookup_.empty() ? &tree_ : nullptr; }

  void draft_resident(Resident& resident, int batch) override {
    if (tree_.depth() == 0) return;
    const int width =
        std::min({head_vocab_, kMaxTreeNodes, std::max(num_ranks_, kCoupledCandidates)});
    const Candidates found = run_heads(resident.hidden(batch), tree_.depth(), width);
    TensorView token_map;
    if (!model_->token_map.empty()) {
      const auto size = static_cast<int64_t>(model_->token_map.size());
      if (!token_map_) {
        token_map_ = ops_.allocate(size * 4);
        ops_.upload(token_map_->data(), model_->token_map.data(), size * 4);
      }
      token_map = TensorView(token_map_->data(), DType::i32, size);
    }
    resident.fill_tree(batch, found.ids, found.values, token_map);
  }

  void draft(std::span<const DraftInput> inputs, std::span<DraftTree> trees) override {
    const std::lock_guard lock(mutex_);
    std::vector<size_t> ready;
    std::vector<Said> said;
    int depth = 0;
    for (size_t i = 0; i < inputs.size(); ++i) {
      if (!inputs[i].hidden || inputs[i].max_depth < 1 || inputs[i].max_nodes < 2) continue;
      Said one = look_up(inputs[i]);
      while (room(inputs[i], trees[i]) && one.value() > best_value()) one.add(trees[i]);
      if (!room(inputs[i], trees[i])) continue;  // nothing is left for the heads to say
      ready.push_back(i);
      said.push_back(one);
      depth = std::max(depth, std::min(inputs[i].max_depth, tree_.depth()));
    }
    if (ready.empty() || depth == 0) return;

    bool sampled = false;
    for (const size_t i : ready) sampled |= inputs[i].sampling->temperature > 0.0f;
    const int width = std::min({head_vocab_, kMaxTreeNodes,
                                sampled ? std::max(num_ranks_, kCoupledCandidates) : num_ranks_});
    read_heads(inputs, ready, depth, width);
    for (size_t row = 0; row < ready.size(); ++row) {
      fill(inputs[ready[row]], said[row], static_cast<int>(row), static_cast<int>(ready.size()),
           depth, width, trees[ready[row]]);
    }
  }

  // Candidates of all the tree's depths for many texts at once, see head_candidates().
  void rank(const float* hidden, int64_t num_rows, int width, int32_t* ids) {
    const std::lock_guard lock(mutex_);
    const int64_t d = model_->config.hidden_size;
    for (int64_t start = 0; start < num_rows; start += kRankedAtOnce) {
      const int64_t n = std::min(kRankedAtOnce, num_rows - start);
      std::vector<DraftInput> inputs(static_cast<size_t>(n));
      std::vector<size_t> ready(inputs.size());
      std::iota(ready.begin(), ready.end(), size_t{0});
      for (const size_t i : ready) {
        inputs[i].hidden = hidden + (start + static_cast<int64_t>(i)) * d;
      }
      read_heads(inputs, ready, tree_.depth(), width);
      for (int head = 0; head < tree_.depth(); ++head) {
        std::copy_n(candidates_.data() + head * n * width, n * width,
                    ids + (head * num_rows + start) * width);
      }
    }
  }

 private:
  // The most valuable nodes first, parents before children; in the tree's own order where the text
  // takes no part, since then the order matters only to a step without room for all.
  void order_nodes(const GuessValues& values) {
    const int count = tree_.num_nodes();
    node_value_.assign(static_cast<size_t>(count), 1.0f);
    for (int node = 1; node < count; ++node) order_.push_back(node);
    if (lookup_.empty()) return;
    MEDUSA_CHECK_ARG(static_cast<int>(values.nodes.size()) == count - 1,
                     "medusa drafter: ", values.nodes.size(), " values given, the tree has ",
                     count - 1, " nodes beside the root");
    const auto is_share = [](float value) { return value >= 0.0f && value <= 1.0f; };
    bool shares = std::all_of(values.nodes.begin(), values.nodes.end(), is_share);
    for (const auto& row : lookup_) shares &= std::all_of(row.begin(), row.end(), is_share);
    MEDUSA_CHECK_ARG(shares, "medusa drafter: a value is outside [0, 1]");
    for (const int node : order_) {
      node_value_[static_cast<size_t>(node)] =
          std::min(values.nodes[static_cast<size_t>(node - 1)],
                   node_value_[static_cast<size_t>(tree_.parent(node))]);
    }
    std::stable_sort(order_.begin(), order_.end(), [&](int a, int b) {
      return node_value_[static_cast<size_t>(a)] > node_value_[static_cast<size_t>(b)];
    });
  }

  // What followed where the end of the text stood before. At the text's end it goes on with itself:
  // a text that repeats p tokens is guessed further than p.
  struct Said {
    std::span<const int32_t> tokens;  // from the match to the text's end
    const float* values = nullptr;    // of the guesses that are left
    size_t left = 0, used = 0;
    int last = 0;  // node of the guess before

    float value() const { return left == 0 ? -1.0f : *values; }
    void add(DraftTree& tree) {
      last = tree.add(last, tokens[used++ % tokens.size()]);
      --left;
      ++values;
    }
  };
  Said look_up(const DraftInput& input) const {
    // Typical acceptance takes what is likely enough: a copied run would win too often.
    const SamplingParams& sampling = *input.sampling;
    if (sampling.temperature > 0.0f && sampling.acceptance == Acceptance::typical) return {};
    const Match match = latest_match(input.tokens, static_cast<int>(lookup_.size()));
    if (match.length == 0) return {};
    const std::vector<float>& values = lookup_[static_cast<size_t>(match.length - 1)];
    return {input.tokens.subspan(static_cast<size_t>(match.next)), values.data(),
            std::min(values.size(), static_cast<size_t>(input.max_depth))};
  }

  bool room(const DraftInput& input, const DraftTree& tree) const {
    return tree.num_nodes() < std::min(input.max_nodes, tree_.num_nodes());
  }
  float best_value() const {
    return order_.empty() ? 0.0f : node_value_[static_cast<size_t>(order_.front())];
  }

  // One Buffer per role, grown outside the ops; row h * B + b of each is head h of sequence b.
  void* memory(std::unique_ptr<Buffer>& buffer, int64_t num_bytes) {
    if (!buffer || buffer->num_bytes() < num_bytes) {
      if (buffer) outgrown_.push_back(std::move(buffer));
      buffer = ops_.allocate(num_bytes);
    }
    return buffer->data();
  }

  struct Candidates {
    TensorView ids, values;  // [depth * B, width]
  };

  // Candidates of the first `depth` heads for the rows of hidden [B, d] f32, backend memory.
  Candidates run_heads(TensorView hidden, int depth, int width) {
    const int64_t batch = hidden.size(0), d = hidden.size(1);
    const int64_t rows = batch * depth;
    // Blocks of heads and what follows them may be stored in different types.
    const Head& first = model_->heads.front();
    const Weight& output = first.lm_head ? *first.lm_head : model_->draft_output();
    const DType act_out = ops_.activation_dtype(output.dtype());
    const DType act =
        first.blocks.empty() ? act_out : ops_.activation_dtype(first.blocks.front()->dtype());
    auto* u = static_cast<float*>(memory(u_, rows * d * 4));
    auto* y = static_cast<float*>(memory(y_, batch * d * 4));
    auto* normed = static_cast<std::byte*>(memory(copy_, rows * d * dtype_bytes(act)));
    auto* last = act == act_out
                     ? normed
                     : static_cast<std::byte*>(memory(last_, rows * d * dtype_bytes(act_out)));
    auto* logits = static_cast<float*>(memory(logits_, rows * head_vocab_ * 4));
    auto* ids = static_cast<int32_t*>(memory(ids_, rows * width * 4));
    auto* values = static_cast<float*>(memory(values_memory_, rows * width * 4));
    const TensorView index = repeated(batch, rows);
    ops_.gather_rows(hidden, index, TensorView(u, DType::f32, rows, d));
    ops_.gather_rows(hidden, index, TensorView(normed, act, rows, d));
    for (int head = 0; head < depth; ++head) {
      const TensorView state(u + head * batch * d, DType::f32, batch, d);
      const TensorView update(y, DType::f32, batch, d);
      const TensorView copy(normed + head * batch * d * dtype_bytes(act), act, batch, d);
      const TensorView done(last + head * batch * d * dtype_bytes(act_out), act_out, batch, d);
      const Head& weights = model_->heads[static_cast<size_t>(head)];
      for (size_t layer = 0; layer < weights.blocks.size(); ++layer) {
        const TensorView bias(weights.biases[layer]->data(), DType::f32, d);
        ops_.linear(copy, *weights.blocks[layer], bias, false, update);
        ops_.residual_silu(update, state, layer + 1 == weights.blocks.size() ? done : copy);
      }
      if (weights.lm_head) {
        ops_.linear(
            done, *weights.lm_head, TensorView(), false,
            TensorView(logits + head * batch * head_vocab_, DType::f32, batch, head_vocab_));
      }
    }
    if (model_->config.heads.shared_lm_head) {
      // All heads in one product: the shared matrix is read once.
      ops_.linear(TensorView(last, act_out, rows, d), model_->draft_output(), TensorView(), false,
                  TensorView(logits, DType::f32, rows, head_vocab_));
    }
    const Candidates found{{ids, DType::i32, rows, width}, {values, DType::f32, rows, width}};
    ops_.top_k(TensorView(logits, DType::f32, rows, head_vocab_), found.ids, found.values);
    return found;
  }

  // 0, 1, ..., batch - 1, 0, 1, ... in backend memory. One piece for each batch, since recorded
  // steps of several batches live side by side.
  TensorView repeated(int64_t batch, int64_t rows) {
    std::unique_ptr<Buffer>& index = indices_[batch];
    if (!index || index->num_bytes() < rows * 4) {
      std::vector<int32_t> all(static_cast<size_t>(rows));
      for (int64_t i = 0; i < rows; ++i)
        all[static_cast<size_t>(i)] = static_cast<int32_t>(i % batch);
      ops_.upload(memory(index, rows * 4), all.data(), rows * 4);
    }
    return {index->data(), DType::i32, rows};
  }

  // Runs the heads and brings their candidates to the host, as ids of the vocabulary.
  void read_heads(std::span<const DraftInput> inputs, const std::vector<size_t>& ready, int depth,
                  int width) {
    const int64_t d = model_->config.hidden_size;
    const auto batch = static_cast<int64_t>(ready.size());
    auto* hidden = static_cast<float*>(memory(hidden_, batch * d * 4));
    for (int64_t b = 0; b < batch; ++b) {
      ops_.upload(hidden + b * d, inputs[ready[static_cast<size_t>(b)]].hidden, d * 4);
    }
    const Candidates found = run_heads(TensorView(hidden, DType::f32, batch, d), depth, width);
    candidates_.resize(static_cast<size_t>(batch * depth * width));
    values_.resize(candidates_.size());
    ops_.download(candidates_.data(), found.ids.data, found.ids.num_bytes());
    ops_.download(values_.data(), found.values.data, found.values.num_bytes());
    for (int32_t& id : candidates_) {
      if (!model_->token_map.empty()) id = model_->token_map[static_cast<size_t>(id)];
    }
  }

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

  void fill(const DraftInput& input, Said said, int row, int batch, int depth, int width,
            DraftTree& tree) {
    for (int level = 1; level <= depth; ++level) {
      const auto offset = static_cast<size_t>(((level - 1) * batch + row) * width);
      couple(input, level, candidates_.data() + offset, values_.data() + offset, width);
    }
    std::vector<int> node_of(static_cast<size_t>(tree_.num_nodes()), -1);
    node_of[0] = 0;
    const int max_depth = std::min(input.max_depth, depth);
    for (const int i : order_) {
      while (room(input, tree) && said.value() > node_value_[static_cast<size_t>(i)])
        said.add(tree);
      if (!room(input, tree)) return;
      const int level = tree_.node_depth(i);
      const int parent = node_of[static_cast<size_t>(tree_.parent(i))];
      if (level > max_depth || parent < 0) continue;
      const auto at = static_cast<size_t>(((level - 1) * batch + row) * width + tree_.rank(i));
      node_of[static_cast<size_t>(i)] = tree.add(parent, candidates_[at]);
    }
    while (room(input, tree) && said.left > 0) said.add(tree);
  }

  std::shared_ptr<const Model> model_;
  TreeSpec tree_;
  Backend& ops_;
  std::vector<std::vector<float>> lookup_;  // GuessValues::lookup
  std::vector<float> node_value_;           // by node
  std::vector<int> order_;                  // nodes but the root, as they are tried
  int head_vocab_ = 0, num_ranks_ = 0;
  std::mutex mutex_;  // two sessions may hold one drafter by mistake; they shall only be slow
  std::unique_ptr<Buffer> hidden_, u_, y_, copy_, last_, logits_, ids_, values_memory_;
  std::unique_ptr<Buffer> token_map_;
  std::map<int64_t, std::unique_ptr<Buffer>> indices_;  // by batch
  std::vector<std::unique_ptr<Buffer>> outgrown_;       // recorded steps may still use them
  std::vector<int32_t> candidates_;
  std::vector<float> values_;
};

}  // namespace

std::shared_ptr<Drafter> make_medusa_drafter(std::shared_ptr<const Model> model,
                                             const TreeSpec& tree, const GuessValues& values) {
  return std::make_shared<MedusaDrafter>(std::move(model), tree, values);
}

void head_candidates(std::shared_ptr<const Model> model, const float* hidden, int64_t num_rows,
                     int width, int32_t* ids) {
  const HeadsConfig& heads = model->config.heads;
  const int most = std::min(num_ranked(model->config), kMaxTreeNodes);
  MEDUSA_CHECK_ARG(heads.num_heads > 0, "head candidates: the model has no heads");
  MEDUSA_CHECK_ARG(width >= 1 && width <= most, "head candidates: ", width,
                   " are wanted of each head, allowed is 1 to ", most);
  std::vector<std::vector<int>> chain;
  for (int depth = 1; depth <= heads.num_heads; ++depth) chain.emplace_back(depth, 0);
  MedusaDrafter(std::move(model), TreeSpec::from_paths(chain), {})
      .rank(hidden, num_rows, width, ids);
}

}  // namespace medusa
