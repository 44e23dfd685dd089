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

// Lowest id of the greatest value; NaN never wins.
int32_t argmax(const float* values, int64_t n) {
  int64_t best = 0;
  float best_value = kLowest;
  constexpr int64_t kBlock = 256, kMaxima = 16;
  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t end = std::min(n, start + kBlock);
    // The maximum first, in lanes of their own so that it vectorises: few blocks hold a new best.
    float maxima[kMaxima];
    std::fill(maxima, maxima + kMaxima, kLowest);
    int64_t i = start;
    for (; i + kMaxima <= end; i += kMaxima) {
      for (int64_t lane = 0; lane < kMaxima; ++lane) {
        maxima[lane] = values[i + lane] > maxima[lane] ? values[i + lane] : maxima[lane];
      }
    }
    for (; i < end; ++i) maxima[0] = values[i] > maxima[0] ? values[i] : maxima[0];
    const float block_max = *std::max_element(maxima, maxima + kMaxima);
    if (!(block_max > best_value)) continue;
    best_value = block_max;
    best = start;
    while (values[best] != block_max) ++best;
  }
  return static_cast<int32_t>(best);
}

// (value descending, id ascending); NaN last.
struct ByScore {
  const float* scores;
  float key(int32_t id) const {
    const float value = scores[id];
    return value == value ? value : kLowest;
  }
  bool operator()(int32_t a, int32_t b) const { return key(a) != key(b) ? key(a) > key(b) : a < b; }
};

uint64_t mass_of(float score, float max_score) {
  return static_cast<uint64_t>(std::llrint(double{exp_f32(score - max_score)} * 4294967296.0));
}

// ids that pass top-k, top-p and min-p on the tempered scores, in scratch.ids; false: all pass.
bool filter(const float* z, int64_t vocab, float max_score, const SamplingParams& sampling,
            ChooseScratch& scratch) {
  const bool by_k = sampling.top_k > 0 && sampling.top_k < vocab;
  const bool by_p = sampling.top_p < 1.0;
  const bool by_min = sampling.min_p > 0.0;
  if (!by_k && !by_p && !by_min) return false;

  std::vector<int32_t>& ids = scratch.ids;
  const ByScore order{z};
  ids.clear();
  if (by_k) {
    for (int64_t i = 0; i < vocab; ++i) ids.push_back(static_cast<int32_t>(i));
    std::nth_element(ids.begin(), ids.begin() + sampling.top_k - 1, ids.end(), order);
    ids.resize(static_cast<size_t>(sampling.top_k));
  } else {
    // Top-p never keeps an id of no mass: it comes after all the mass.
    const float floor = by_p ? max_score - 23.0f : kLowest;
    for (int64_t i = 0; i < vocab; ++i) {
      if (z[i] >= floor) ids.push_back(static_cast<int32_t>(i));
    }
  }

  if (by_p) {
    uint64_t total = 0;
    for (const int32_t id : ids) total += mass_of(z[id], max_score);
    const double limit = sampling.top_p * static_cast<double>(total);
    // A heap: the few ids that make up the mass are popped in order, the rest is never sorted.
    const auto worse = [&](int32_t a, int32_t b) { return order(b, a); };
    std::make_heap(ids.begin(), ids.end(), worse);
    uint64_t before = 0;
    size_t kept = 0;
    while (kept < ids.size() && static_cast<double>(before) < limit) {
      std::pop_heap(ids.begin(), ids.end() - static_cast<int64_t>(kept), worse);
      before += mass_of(z[ids[ids.size() - 1 - kept]], max_score);
      ++kept;
    }
    ids.erase(ids.begin(), ids.end() - static_cast<int64_t>(kept));
  }
  if (by_min) {
    std::erase_if(
        ids, [&](int32_t id) { return !(double{exp_f32(z[id] - max_score)} >= sampling.min_p); });
  }
  return true;
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

// At least gumbel_from_bits(word), for the price of counting bits: E >= u, so G <= -log u <= (33 -
// width) log 2.
float gumbel_bound(uint32_t word) {
  return static_cast<float>(33 - std::bit_width(word)) * 0.693148f + 1e-3f;
}

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
                   "try dtype f32");
}

bool is_end(const VerifyItem& item, int32_t token) {
  return std::find(item.eos_ids.begin(), item.eos_ids.end(), token) != item.eos_ids.end();
}

void exact_walk(const float* logits, int64_t vocab, const VerifyItem& item,
                ChooseScratch& scratch) {
  const DraftTree& tree = *item.tree;
  Accepted& accepted = *item.accepted;
  int node = 0;
  while (node >= 0) {
    const float* row = logits + (item.first_row + node) * vocab;
    const auto position =
        static_cast<uint32_t>(item.tokens.size()) + static_cast<uint32_t>(tree.depth(node));
    const int32_t token = choose_token(penalised(row, vocab, item, node, scratch), vocab,
                                       *item.sampling, position, scratch);
    check_finite(row[token], position);
    accepted.path.push_back(node);
    accepted.tokens.push_back(token);
    if (is_end(item, token) || static_cast<int>(accepted.tokens.size()) >= item.max_tokens) return;
    node = tree.find_child(node, token);
  }
}

// Decides which children of a node stand, and their log probabilities.
void judge_children(const float* logits, int64_t vocab, const VerifyItem& item, int node,
                    std::vector<double>& likelihood, ChooseScratch& scratch) {
  const SamplingParams& sampling = *item.sampling;
  const DraftTree& tree = *item.tree;
  const double temperature = sampling.temperature;
  const double max_logit = logits[argmax(logits, vocab)];
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

void typical_path(const float* logits, int64_t vocab, const VerifyItem& item,
                  ChooseScratch& scratch) {
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
    judge_children(penalised(row, vocab, item, v, scratch), vocab, item, v, likelihood, scratch);
  }

  for (int v = best; v >= 0; v = tree.parent(v)) accepted.path.push_back(v);
  std::reverse(accepted.path.begin(), accepted.path.end());
  const float* last = logits + (item.first_row + best) * vocab;
  for (size_t i = 1; i < accepted.path.size(); ++i) {
    accepted.tokens.push_back(tree.token(accepted.path[i]));
  }
  const int32_t next = argmax(penalised(last, vocab, item, best, scratch), vocab);
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

int32_t choose_token(const float* logits, int64_t vocab, const SamplingParams& sampling,
                     uint32_t position, ChooseScratch& scratch) {
  const int32_t top = argmax(logits, vocab);
  if (sampling.temperature == 0.0f) return top;

  // y / T, in place of the penalised copy where there is one.
  std::vector<float>& z = scratch.scores;
  z.resize(static_cast<size_t>(vocab));
  for (int64_t i = 0; i < vocab; ++i) z[static_cast<size_t>(i)] = logits[i] / sampling.temperature;
  const float max_score = z[static_cast<size_t>(top)];
  if (!std::isfinite(max_score)) return top;  // an overflow must not make a tie

  NoisyBest best;
  if (filter(z.data(), vocab, max_score, sampling, scratch)) {
    for (const int32_t id : scratch.ids) {
      if (std::isnan(z[static_cast<size_t>(id)])) continue;  // kept only for want of others
      const uint32_t word =
          noise_word(sampling.seed, sampling.sample_index, position, static_cast<uint32_t>(id));
      best.offer(z[static_cast<size_t>(id)] + gumbel_from_bits(word), id);
    }
    return best.id >= 0 ? best.id : top;
  }

  // No filter: noise is bounded, so ids too far below the best so far cannot win and need none. The
  // likeliest goes first.
  best.offer(max_score + gumbel_from_bits(noise_word(sampling.seed, sampling.sample_index, position,
                                                     static_cast<uint32_t>(top))),
             top);
  for (int64_t start = 0; start < vocab; start += 4) {
    const int64_t end = std::min(vocab, start + 4);
    bool possible = false;
    for (int64_t i = start; i < end; ++i) {
      possible |= z[static_cast<size_t>(i)] + kMaxGumbel >= best.value;
    }
    if (!possible) continue;
    const Philox4 words = noise_words(sampling.seed, sampling.sample_index, position,
                                      static_cast<uint32_t>(start / 4));
    for (int64_t i = start; i < end; ++i) {
      const float score = z[static_cast<size_t>(i)];
      const uint32_t word = words.word[i - start];
      if (score + gumbel_bound(word) < best.value || score != score) continue;
      best.offer(score + gumbel_from_bits(word), static_cast<int32_t>(i));
    }
  }
  return best.id;
}

void verify_tree(const float* logits, int64_t vocab, const VerifyItem& item,
                 ChooseScratch& scratch) {
  item.accepted->path.clear();
  item.accepted->tokens.clear();
  const SamplingParams& sampling = *item.sampling;
  // At temperature 0 the typical rule is the greedy walk.
  if (sampling.acceptance == Acceptance::typical && sampling.temperature > 0.0f) {
    typical_path(logits, vocab, item, scratch);
  } else {
    exact_walk(logits, vocab, item, scratch);
  }
}

}  // namespace medusa::cpu
