// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <limits>
#include <queue>
#include <vector>

#include "medusa/error.h"
#include "medusa/guesses.h"
#include "medusa/lookup.h"
#include "medusa/noise.h"

namespace medusa {
namespace {

// Of the noise beside logits that are known no better than a head knows them. Of 0.65 to 2.5 the
// best for the demo model at temperatures 0.7 and 1, where 0.65 to 0.8 hardly differ.
constexpr float kNoise = 0.75f;

// Of the draw that will choose the token after `depth` others, on the scale of its logit.
float noise_of(const GuessSources& from, int depth, int32_t token) {
  if (from.noise == nullptr) return 0.0f;
  const auto position = static_cast<uint32_t>(from.text.size() + static_cast<size_t>(depth));
  const uint32_t word = noise_word(from.noise->seed, from.noise->sample_index, position,
                                   static_cast<uint32_t>(token));
  return from.noise->temperature * gumbel_from_bits(word);
}

class Grower {
 public:
  Grower(const GuessModel& model, const GuessSources& from, int max_nodes, int max_depth,
         DraftTree& tree)
      : model_(model), from_(from), max_nodes_(max_nodes), max_depth_(max_depth), tree_(tree) {}

  void run() {
    const size_t length = from_.text.size();
    expand({1.0f, 0, -1, from_.text.back(), from_.told.matched > 0}, 0,
           length > 1 ? from_.text[length - 2] : -1);
    while (tree_.num_nodes() < max_nodes_ && !waiting_.empty()) {
      const Guess guess = waiting_.top();
      waiting_.pop();
      const int size = tree_.num_nodes(), node = tree_.add(guess.parent, guess.token);
      if (node < size) continue;  // a head offered a token twice
      if (tree_.num_nodes() < max_nodes_) expand(guess, node, tree_.token(guess.parent));
    }
  }

 private:
  struct Guess {
    float value;
    int order;  // of equals the first
    int parent;
    int32_t token;
    bool told;  // its path is what the text said

    bool operator<(const Guess& other) const {
      return value != other.value ? value < other.value : order > other.order;
    }
  };

  void expand(const Guess& guess, int node, int32_t before) {
    const int depth = tree_.depth(node);
    if (depth >= max_depth_) return;
    if (depth >= from_.depth) {  // beyond the heads only the text knows more
      if (!guess.told || depth >= kLookupAhead) return;
      const auto matched = static_cast<size_t>(from_.told.matched_at(depth));
      push(guess.value * model_.chain[matched - 1], node, from_.told.at(depth), true);
      return;
    }
    if (depth == static_cast<int>(by_depth_.size())) {
      by_depth_.push_back(head_offers(from_, depth));
    }
    Offers offers = by_depth_[static_cast<size_t>(depth)];
    add_offers(model_.ngrams.get(), from_, depth, before, guess.token, guess.told, offers);
    const int count = offers.count;
    const GuessModel::Head& head = model_.heads[static_cast<size_t>(depth)];
    std::array<float, kMaxOffers> shares;
    float best = head.rest;
    for (int i = 0; i < count; ++i) {
      const Offer& offer = offers.list[static_cast<size_t>(i)];
      float& score = shares[static_cast<size_t>(i)];
      score = head.head * offer.log_share + head.ngram * offer.gain + kNoise * offer.noise;
      if (offer.told) score += head.lookup[static_cast<size_t>(from_.told.matched_at(depth) - 1)];
      best = std::max(best, score);
    }
    float total = exp_f32(head.rest - best);
    for (int i = 0; i < count; ++i) {
      float& share = shares[static_cast<size_t>(i)];
      total += share = exp_f32(share - best);
    }
    for (int i = 0; i < count; ++i) {
      const Offer& offer = offers.list[static_cast<size_t>(i)];
      push(guess.value * shares[static_cast<size_t>(i)] / total, node, offer.token, offer.told);
    }
  }

  void push(float value, int parent, int32_t token, bool told) {
    waiting_.push({value, order_++, parent, token, told});
  }

  const GuessModel& model_;
  const GuessSources& from_;
  int max_nodes_, max_depth_, order_ = 0;
  DraftTree& tree_;
  std::vector<Offers> by_depth_;  // of the heads, from when a depth is reached
  std::priority_queue<Guess> waiting_;
};

}  // namespace

void GuessModel::check(int num_heads) const {
  MEDUSA_CHECK_ARG(static_cast<int>(heads.size()) == num_heads, "guesses: weights of ",
                   heads.size(), " heads given, the model has ", num_heads);
  const auto is_finite = [](float x) { return x > -1e6f && x < 1e6f; };
  const bool says = !chain.empty();
  bool whole = chain.size() == (says ? kLookupNgram : 0);
  for (const float share : chain) whole &= share >= 0.0f && share <= 1.0f;
  for (const Head& head : heads) {
    whole &= is_finite(head.head) && is_finite(head.ngram) && is_finite(head.rest);
    whole &= head.lookup.size() == chain.size() &&
             std::all_of(head.lookup.begin(), head.lookup.end(), is_finite);
  }
  MEDUSA_CHECK_ARG(whole, "guesses: wanted finite weights, and of lookup ", kLookupNgram,
                   " for each head and as many shares in [0, 1], or none");
}

Told look_up(std::span<const int32_t> text) {
  const Match match = latest_match(text, kLookupNgram);
  if (match.length == 0) return {};
  return {text.subspan(static_cast<size_t>(match.next)), match.length};
}

Offers head_offers(const GuessSources& from, int depth) {
  Offers offers;
  const int32_t* ids = from.ids + depth * from.stride;
  const float* logits = from.logits + depth * from.stride;
  const int width = std::min(from.width, kDrawnCandidates);
  float best = -1e30f, worst = 0.0f;
  for (int i = 0; i < width; ++i) {
    if (ids[i] < 0 || !std::isfinite(logits[i])) continue;
    offers.list[static_cast<size_t>(offers.count++)] = {ids[i], logits[i], 0.0f,
                                                        noise_of(from, depth, ids[i]), false};
    best = std::max(best, logits[i]);
    worst = logits[i];
  }
  if (offers.count == 0) return offers;
  float total = 0.0f;
  for (int i = 0; i < offers.count; ++i) {
    total += exp_f32(offers.list[static_cast<size_t>(i)].log_share - best);
  }
  const float norm = best + log_f32(total);
  for (int i = 0; i < offers.count; ++i) offers.list[static_cast<size_t>(i)].log_share -= norm;
  // No more is known than that it is less likely.
  offers.other = worst - 1.0f - norm;
  return offers;
}

void add_offers(const Ngrams* ngrams, const GuessSources& from, int depth, int32_t before,
                int32_t last, bool on_told, Offers& offers) {
  const auto add = [&](int32_t token) -> Offer& {
    for (int i = 0; i < offers.count; ++i) {
      Offer& offer = offers.list[static_cast<size_t>(i)];
      if (offer.token == token) return offer;
    }
    Offer& offer = offers.list[static_cast<size_t>(offers.count++)];
    offer = {token, offers.other, 0.0f, noise_of(from, depth, token), false};
    return offer;
  };
  Ngrams::After after;
  if (ngrams != nullptr) {
    after = ngrams->after(before, last);
    std::array<int32_t, kFrequent> frequent;
    const int more = after.frequent(frequent);
    for (int i = 0; i < more; ++i) add(frequent[static_cast<size_t>(i)]);
  }
  if (on_told && depth < kLookupAhead) add(from.told.at(depth)).told = true;
  if (ngrams == nullptr) return;
  for (int i = 0; i < offers.count; ++i) {
    Offer& offer = offers.list[static_cast<size_t>(i)];
    offer.gain = after.gain(offer.token);
  }
}

bool text_fills(const GuessModel& model, const Told& told, int max_nodes, int max_depth) {
  const int wanted = max_nodes - 1;
  if (told.matched == 0 || wanted > std::min(max_depth, kLookupAhead)) return false;
  float value = 1.0f;
  for (int ahead = 0; ahead < wanted; ++ahead) {
    value *= model.chain[static_cast<size_t>(told.matched_at(ahead) - 1)];
  }
  return value > 1.0f - model.chain[static_cast<size_t>(told.matched - 1)];
}

void grow(const GuessModel& model, const GuessSources& from, int max_nodes, int max_depth,
          DraftTree& tree) {
  if (text_fills(model, from.told, max_nodes, max_depth)) {
    for (int ahead = 0, node = 0; ahead < max_nodes - 1; ++ahead) {
      node = tree.add(node, from.told.at(ahead));
    }
    return;
  }
  Grower(model, from, max_nodes, max_depth, tree).run();
}

std::vector<int> walk(const GuessModel& model, const Answer& answer, int max_nodes) {
  std::vector<int> rows;
  const int num_rows = answer.num_rows();
  DraftTree tree;
  for (int row = 0; row < num_rows;) {
    rows.push_back(row);
    GuessSources from = answer.sources(row);
    if (!model.chain.empty()) from.told = look_up(from.text);
    tree.reset(from.text.back());
    grow(model, from, max_nodes, num_rows - 1 - row, tree);
    int node = 0, kept = 0;
    while (row + 1 + kept <= num_rows) {
      node = tree.find_child(node, answer.token(row + 1 + kept));
      if (node < 0) break;
      ++kept;
    }
    row += 1 + kept;
  }
  return rows;
}

Judged judge(const std::shared_ptr<const Ngrams>& ngrams, const Answer& answer, bool with_lookup) {
  const int num_rows = std::max(answer.num_rows(), 0);
  const auto cells = static_cast<size_t>(num_rows) * static_cast<size_t>(answer.num_heads);
  Judged judged;
  judged.num_offers = std::min(answer.width, kDrawnCandidates) + kFrequent + 1;
  const auto num_offers = static_cast<size_t>(judged.num_offers);
  judged.log_share.assign(cells * num_offers, -std::numeric_limits<float>::infinity());
  judged.gain.assign(cells * num_offers, 0.0f);
  judged.right.assign(cells, -2);
  judged.told.assign(cells, -1);
  judged.matched.assign(cells, 0);
  for (int row = 0; row < num_rows; ++row) {
    GuessSources from = answer.sources(row);
    if (with_lookup) from.told = look_up(from.text);
    const int left = num_rows - row;  // tokens of the answer that follow
    int kept = 0;
    while (from.told.matched > 0 && kept < std::min(left, kLookupAhead) &&
           from.told.at(kept) == answer.token(row + 1 + kept)) {
      ++kept;
    }
    judged.found.push_back(static_cast<int8_t>(from.told.matched));
    judged.kept.push_back(static_cast<int8_t>(kept));
    for (int head = 0; head < std::min(answer.num_heads, left); ++head) {
      const int32_t last = answer.token(row + head);
      const size_t before = from.text.size() + static_cast<size_t>(head);
      const bool on_told = from.told.matched > 0 && kept >= head;
      Offers offers = head_offers(from, head);
      add_offers(ngrams.get(), from, head, before > 1 ? answer.tokens[before - 2] : -1, last,
                 on_told, offers);
      const size_t cell = static_cast<size_t>(row) * static_cast<size_t>(answer.num_heads) +
                          static_cast<size_t>(head);
      judged.right[cell] = -1;
      for (int i = 0; i < offers.count; ++i) {
        const Offer& offer = offers.list[static_cast<size_t>(i)];
        judged.log_share[cell * num_offers + static_cast<size_t>(i)] = offer.log_share;
        judged.gain[cell * num_offers + static_cast<size_t>(i)] = offer.gain;
        if (offer.token == answer.token(row + 1 + head))
          judged.right[cell] = static_cast<int8_t>(i);
        if (offer.told) {
          judged.told[cell] = static_cast<int8_t>(i);
          judged.matched[cell] = static_cast<int8_t>(from.told.matched_at(head));
        }
      }
    }
  }
  return judged;
}

}  // namespace medusa
