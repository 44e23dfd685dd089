// choose: the model's own token at a node, and the walk or the typical rule over a tree.
//
//   exact     v = root; loop: emit x_v; if a child of v holds x_v, v = that child, else stop
//   typical   child c stands if p_v(c) > min(epsilon, delta exp(-H(p_v))); of the standing nodes
//             the deepest wins
//
// Shapes    logits [N, V] f32; one tree per item, its nodes in consecutive rows
// Traffic   4 V bytes for each pass over a visited node; only nodes that the walk visits are read
// Exact     every emitted token is the model's own choice at its position, whatever was proposed
// Source    Gumbel-max coupling, arXiv:2408.07978; typical acceptance, arXiv:2401.10774
// SPDX-License-Identifier: Apache-2.0
#include "backend/cpu/choose.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "medusa/error.h"
#include "medusa/noise.h"

namespace medusa::cpu {
namespace {

constexpr float kLowest = -std::numeric_limits<float>::infinity();
static_assert(kGreatestNoise == kMaxGumbel);

// Up to which (score, id) ids are kept, in the order score descending, id ascending.
struct Border {
  float score = kLowest;
  int32_t id = std::numeric_limits<int32_t>::max();
  bool keeps(float other, int32_t other_id) const {
    return other > score || (other == score && other_id <= id);
  }
};

// Finds the border among scratch.candidates: an id is kept while the mass strictly before it is
// below `limit`, which the sum of all masses reaches.
class BorderSearch {
 public:
  BorderSearch(float max_score, double limit, ChooseScratch& scratch)
      : max_score_(max_score), limit_(limit), scratch_(scratch) {}

  Border find() {
    const int bin = find_bin();
    std::vector<int32_t>& order = scratch_.order;
    order.clear();
    for (size_t i = 0; i < scratch_.candidates.size(); ++i) {
      if (bin_of(scratch_.candidates[i]) == bin) order.push_back(static_cast<int32_t>(i));
    }
    return split(order);
  }

 private:
  // Equal steps down from the greatest; the last holds all that is far below.
  static constexpr int kBins = 2048;
  static constexpr float kBinsPerUnit = 64.0f;

  int bin_of(float score) const {
    return static_cast<int>(std::min((max_score_ - score) * kBinsPerUnit, float{kBins - 1}));
  }

  // The bin that holds the border; before_ becomes the mass of those above.
  int find_bin() {
    std::vector<uint64_t>& histogram = scratch_.histogram;
    histogram.assign(kBins, 0);
    for (size_t i = 0; i < scratch_.candidates.size(); ++i) {
      histogram[static_cast<size_t>(bin_of(scratch_.candidates[i]))] += scratch_.masses[i];
    }
    int bin = 0;
    while (bin + 1 < kBins && reaches_no_limit(histogram[static_cast<size_t>(bin)])) {
      before_ += histogram[static_cast<size_t>(bin++)];
    }
    return bin;
  }

  bool reaches_no_limit(uint64_t mass) const {
    return static_cast<double>(before_ + mass) < limit_;
  }

  // Halves what holds the border until one candidate is left. Of equal scores the lower place is
  // the lower id.
  Border split(std::vector<int32_t>& order) {
    const auto score = [&](int32_t i) { return scratch_.candidates[static_cast<size_t>(i)]; };
    auto first = order.begin(), last = order.end();
    while (last - first > 1) {
      const auto middle = first + (last - first) / 2;
      std::nth_element(first, middle, last, [&](int32_t a, int32_t b) {
        return score(a) != score(b) ? score(a) > score(b) : a < b;
      });
      uint64_t mass = 0;
      for (auto i = first; i < middle; ++i) mass += scratch_.masses[static_cast<size_t>(*i)];
      if (reaches_no_limit(mass)) {
        before_ += mass;
        first = middle;
      } else {
        last = middle;
      }
    }
    return {score(*first), scratch_.ids[static_cast<size_t>(*first)]};
  }

  float max_score_;
  double limit_;
  ChooseScratch& scratch_;
  uint64_t before_ = 0;
};

// What top-k, top-p and min-p let pass.
struct Filter {
  Border border;
  double min_p = 0;
  float max_score = 0;

  bool keeps(float score, int32_t id) const {
    return border.keeps(score, id) && (min_p <= 0.0 || double{exp_f32(score - max_score)} >= min_p);
  }
  // No score below it is kept.
  float floor() const {
    if (min_p <= 0.0) return border.score;
    const float slack = 1e-3f + 1e-6f * std::abs(max_score);  // exp_f32 is far closer to exp
    return std::max(border.score, max_score + static_cast<float>(std::log(min_p)) - slack);
  }
};

// Fills scratch.ids and scratch.candidates with those whose score is not below the floor.
void gather(const Kernels& kernels, const float* logits, int64_t vocab, float temperature,
            float floor, ChooseScratch& scratch) {
  const auto room = static_cast<size_t>(vocab + 16);
  scratch.ids.resize(room);
  scratch.candidates.resize(room);
  const auto count = static_cast<size_t>(kernels.gather(
      logits, vocab, temperature, floor, scratch.ids.data(), scratch.candidates.data()));
  scratch.ids.resize(count);
  scratch.candidates.resize(count);
}

// Leaves the candidates that the border keeps.
void drop_beyond(const Border& border, ChooseScratch& scratch) {
  size_t kept = 0;
  for (size_t i = 0; i < scratch.ids.size(); ++i) {
    if (!border.keeps(scratch.candidates[i], scratch.ids[i])) continue;
    scratch.candidates[kept] = scratch.candidates[i];
    scratch.ids[kept++] = scratch.ids[i];
  }
  scratch.candidates.resize(kept);
  scratch.ids.resize(kept);
}

// The masses of the candidates.
const std::vector<uint64_t>& weigh(const Kernels& kernels, float max_score,
                                   ChooseScratch& scratch) {
  scratch.masses.resize(scratch.ids.size());
  kernels.masses(scratch.candidates.data(), static_cast<int64_t>(scratch.ids.size()), max_score,
                 scratch.masses.data());
  return scratch.masses;
}

Filter make_filter(const Kernels& kernels, const float* logits, int64_t vocab, float max_score,
                   const SamplingParams& sampling, ChooseScratch& scratch) {
  Filter filter;
  filter.min_p = sampling.min_p;
  filter.max_score = max_score;
  const bool by_k = sampling.top_k > 0 && sampling.top_k < vocab;
  const bool by_p = sampling.top_p < 1.0;
  const auto k = static_cast<size_t>(sampling.top_k);

  if (by_k) {
    // The score of the k-th logit is the k-th score: of those not below it, few are too many.
    constexpr size_t kSorted = 256;
    float floor = kLowest;
    if (k <= kSorted) {
      int32_t top_ids[kSorted];
      float top_logits[kSorted];
      kernels.top_k(logits, vocab, static_cast<int>(k), top_ids, top_logits);
      floor = top_logits[k - 1] / sampling.temperature;
    }
    gather(kernels, logits, vocab, sampling.temperature, floor, scratch);
    filter.border.score = floor;
    if (scratch.ids.size() > k) {  // else all of them, for there are fewer numbers or no ties
      scratch.masses.assign(scratch.ids.size(), 1);
      filter.border = BorderSearch(max_score, static_cast<double>(k), scratch).find();
    }
  }
  if (!by_p) return filter;

  uint64_t total = 0;
  if (by_k) {
    drop_beyond(filter.border, scratch);
    for (const uint64_t mass : weigh(kernels, max_score, scratch)) total += mass;
    const double limit = sampling.top_p * static_cast<double>(total);
    filter.border = BorderSearch(max_score, limit, scratch).find();
    return filter;
  }
  total = kernels.total_mass(logits, vocab, sampling.temperature, max_score);
  const double limit = sampling.top_p * static_cast<double>(total);
  // All ids further down than this have too little mass together to hold the border, roundings
  // aside: those can ask for a second turn. None of no mass is ever kept.
  const double tail = (1.0 - sampling.top_p) * static_cast<double>(total) * 0x1p-32;
  float range =
      std::min(kMassRange, static_cast<float>(std::log(static_cast<double>(vocab) / tail)) + 0.1f);
  for (uint64_t reached = 0; static_cast<double>(reached) < limit; range = kMassRange) {
    gather(kernels, logits, vocab, sampling.temperature, max_score - range, scratch);
    reached = 0;
    for (const uint64_t mass : weigh(kernels, max_score, scratch)) reached += mass;
  }
  filter.border = BorderSearch(max_score, limit, scratch).find();
  return filter;
}

// The greatest of z + G, ties to the lowest id.
struct NoisyBest {
  float value = kLowest;
  int32_t id = -1;
  void offer(float candidate, int32_t candidate_id) {
    if (candidate > value || (candidate == value && candidate_id < id) || id < 0) {
      value = candidate;
      id = candidate_id;
    }
  }
};

void penalise(std::vector<float>& scores, std::vector<uint64_t>& seen, int32_t token,
              float penalty) {
  const auto index = static_cast<size_t>(token);
  if (index >= scores.size()) return;
  const uint64_t bit = uint64_t{1} << (index % 64);
  if (seen[index / 64] & bit) return;
  seen[index / 64] |= bit;
  scores[index] = scores[index] < 0.0f ? scores[index] * penalty : scores[index] / penalty;
}

// Logits of one node with the penalty of the text and of the path to the node.
const float* penalised(const float* logits, int64_t vocab, const VerifyItem& item, int node,
                       ChooseScratch& scratch) {
  const float penalty = item.sampling->repetition_penalty;
  if (penalty == 1.0f) return logits;
  scratch.scores.assign(logits, logits + vocab);
  scratch.seen.assign(static_cast<size_t>(vocab + 63) / 64, 0);
  for (const int32_t token : item.tokens) penalise(scratch.scores, scratch.seen, token, penalty);
  for (int v = node; v >= 0; v = item.tree->parent(v)) {
    penalise(scratch.scores, scratch.seen, item.tree->token(v), penalty);
  }
  return scratch.scores.data();
}

// Weights that are broken, or too large for their type, must not pass for text.
void check_finite(float logit, uint32_t position) {
  MEDUSA_CHECK_ARG(std::isfinite(logit), "the logits at position ", position,
                   " hold no finite maximum: the weights are broken or too large for their type; "
                   "try weights=\"f32\"");
}

bool is_end(const VerifyItem& item, int32_t token) {
  return std::find(item.eos_ids.begin(), item.eos_ids.end(), token) != item.eos_ids.end();
}

void exact_walk(const Kernels& kernels, const float* logits, int64_t vocab, const VerifyItem& item,
                ChooseScratch& scratch) {
  const DraftTree& tree = *item.tree;
  Accepted& accepted = *item.accepted;
  int node = 0;
  while (node >= 0) {
    const float* row = logits + (item.first_row + node) * vocab;
    const auto position =
        static_cast<uint32_t>(item.tokens.size()) + static_cast<uint32_t>(tree.depth(node));
    const int32_t token = choose_token(kernels, penalised(row, vocab, item, node, scratch), vocab,
                                       *item.sampling, position, scratch);
    check_finite(row[token], position);
    accepted.path.push_back(node);
    accepted.tokens.push_back(token);
    if (is_end(item, token) || static_cast<int>(accepted.tokens.size()) >= item.max_tokens) return;
    node = tree.find_child(node, token);
  }
}

// Decides which children of a node stand, and their log probabilities.
void judge_children(const Kernels& kernels, const float* logits, int64_t vocab,
                    const VerifyItem& item, int node, std::vector<double>& likelihood,
                    ChooseScratch& scratch) {
  const SamplingParams& sampling = *item.sampling;
  const DraftTree& tree = *item.tree;
  const double temperature = sampling.temperature;
  const double max_logit = logits[kernels.greatest(logits, vocab)];
  std::vector<double>& p = scratch.probabilities;
  p.resize(static_cast<size_t>(vocab));
  double total = 0;
  for (int64_t i = 0; i < vocab; ++i) {
    p[static_cast<size_t>(i)] = std::exp((logits[i] - max_logit) / temperature);
    total += p[static_cast<size_t>(i)];
  }
  double entropy = 0;
  for (int64_t i = 0; i < vocab; ++i) {
    const double probability = p[static_cast<size_t>(i)] / total;
    entropy -= probability * std::log(probability + 1e-5);
  }
  const double threshold = std::min(sampling.epsilon, sampling.delta * std::exp(-entropy));
  for (int child = tree.first_child(node); child >= 0; child = tree.next_sibling(child)) {
    const double probability = p[static_cast<size_t>(tree.token(child))] / total;
    if (probability > threshold) {
      likelihood[static_cast<size_t>(child)] =
          likelihood[static_cast<size_t>(node)] + std::log(probability);
    }
  }
}

void typical_path(const Kernels& kernels, const float* logits, int64_t vocab,
                  const VerifyItem& item, ChooseScratch& scratch) {
  const DraftTree& tree = *item.tree;
  Accepted& accepted = *item.accepted;
  constexpr double kRejected = -std::numeric_limits<double>::infinity();
  std::vector<double> likelihood(static_cast<size_t>(tree.num_nodes()), kRejected);
  likelihood[0] = 0;
  int best = 0;
  // Parents come before children: a node's fate is known when it is reached.
  for (int v = 0; v < tree.num_nodes(); ++v) {
    const double value = likelihood[static_cast<size_t>(v)];
    if (value == kRejected) continue;
    if (tree.depth(v) > tree.depth(best) ||
        (tree.depth(v) == tree.depth(best) && value > likelihood[static_cast<size_t>(best)])) {
      best = v;
    }
    if (tree.first_child(v) < 0) continue;
    const float* row = logits + (item.first_row + v) * vocab;
    judge_children(kernels, penalised(row, vocab, item, v, scratch), vocab, item, v, likelihood,
                   scratch);
  }

  for (int v = best; v >= 0; v = tree.parent(v)) accepted.path.push_back(v);
  std::reverse(accepted.path.begin(), accepted.path.end());
  const float* last = logits + (item.first_row + best) * vocab;
  for (size_t i = 1; i < accepted.path.size(); ++i) {
    accepted.tokens.push_back(tree.token(accepted.path[i]));
  }
  const int32_t next =
      static_cast<int32_t>(kernels.greatest(penalised(last, vocab, item, best, scratch), vocab));
  check_finite(last[next], static_cast<uint32_t>(item.tokens.size() + accepted.tokens.size()));
  accepted.tokens.push_back(next);

  size_t kept = 0;
  while (kept < accepted.tokens.size() && static_cast<int>(kept) < item.max_tokens) {
    if (is_end(item, accepted.tokens[kept++])) break;
  }
  accepted.tokens.resize(kept);
  accepted.path.resize(kept);
}

}  // namespace

int32_t choose_token(const Kernels& kernels, const float* logits, int64_t vocab,
                     const SamplingParams& sampling, uint32_t position, ChooseScratch& scratch) {
  const auto top = static_cast<int32_t>(kernels.greatest(logits, vocab));
  if (sampling.temperature == 0.0f) return top;
  const float max_score = logits[top] / sampling.temperature;
  if (!std::isfinite(max_score)) return top;  // an overflow must not make a tie

  const Filter filter = make_filter(kernels, logits, vocab, max_score, sampling, scratch);
  // The likeliest first: noise is bounded, so the greater the best so far, the fewer can still win.
  // It passes every filter, or shares its score with one that does.
  NoisyBest best;
  const auto offer = [&](float score, int32_t id, uint32_t word) {
    if (!filter.keeps(score, id)) return;
    best.offer(score + gumbel_from_bits(word), id);
  };
  offer(max_score, top,
        noise_word(sampling.seed, sampling.sample_index, position, static_cast<uint32_t>(top)));
  const NoisyRow row{logits,         vocab,         sampling.temperature,
                     filter.floor(), sampling.seed, sampling.sample_index,
                     position};
  NoisyBlock block;
  for (int64_t start = 0;; start = block.first + NoisyBlock::kIds) {
    kernels.noisy_block(row, start, best.value, block);
    if (block.first >= vocab) break;
    for (uint64_t rest = block.possible; rest != 0; rest &= rest - 1) {
      const int lane = std::countr_zero(rest);
      const auto id = static_cast<int32_t>(block.first + lane);
      offer(logits[id] / sampling.temperature, id, block.words[lane]);
    }
  }
  return best.id;
}

void verify_tree(const Kernels& kernels, const float* logits, int64_t vocab, const VerifyItem& item,
                 ChooseScratch& scratch) {
  item.accepted->path.clear();
  item.accepted->tokens.clear();
  const SamplingParams& sampling = *item.sampling;
  // At temperature 0 the typical rule is the greedy walk.
  if (sampling.acceptance == Acceptance::typical && sampling.temperature > 0.0f) {
    typical_path(kernels, logits, vocab, item, scratch);
  } else {
    exact_walk(kernels, logits, vocab, item, scratch);
  }
}

}  // namespace medusa::cpu
