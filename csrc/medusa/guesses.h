// Which guesses the tree of a step holds, where each step grows a tree of its own: the candidates
// of Medusa heads, what tends to follow them, and the text so far, weighed together.
//
//   share(b | node) = exp(s_b) / (exp(rest) + sum of exp(s)),   over the candidates b below a node
//   s_b = head * log p_head(b) + ngram * gain(b | the two tokens before) + lookup[m] where the text
//         said b before, m equal tokens long + a share of the noise that its logit will get
//
// A node's value is the product of the shares on its path, an estimate of how often a step keeps
// it; the tree takes the most valuable nodes, wherever they are. Sources: J. Kim et al., Exploring
// and Improving Drafts in Blockwise Parallel Decoding, arXiv:2404.09221 (rescoring by n-grams);
// Y. Li et al., EAGLE-2, arXiv:2406.16858 (trees by the draft's own confidence).
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "medusa/sampling.h"
#include "medusa/tree.h"

namespace medusa {

constexpr int kLookupNgram = 8;       // equal tokens that are told apart; more count as so many
constexpr int kLookupAhead = 16;      // tokens that the text guesses at most
constexpr int kGuessCandidates = 32;  // that a head offers
constexpr int kDrawnCandidates = 48;  // the same where noise may prefer any of them
constexpr int kFrequent = 8;          // successors offered beside them
constexpr int kMaxOffers = kDrawnCandidates + kFrequent + 1;

// As ngrams.safetensors has it, see medusa_ext/loading/ngrams.py.
struct NgramArrays {
  std::vector<int32_t> contexts, counts;  // [C] tokens with successors, rising; how many
  std::vector<int8_t> unseen;             // [C] gain of all other tokens
  std::vector<int32_t> tokens;            // [E] successors, the most frequent first
  std::vector<int8_t> gains;              // [E] in eighths of a nat, like all gains
  std::vector<int32_t> pair_counts;       // [E] successors of (context, token)
  std::vector<int8_t> pair_unseen;        // [E] added to the gain of all other tokens
  std::vector<int32_t> pair_tokens;       // [P]
  std::vector<int8_t> pair_gains;         // [P]
};

// Which tokens follow which, in text that a model wrote.
class Ngrams {
 public:
  explicit Ngrams(const NgramArrays& arrays);  // ArgumentError: they do not fit each other

  // What follows two tokens.
  class After {
   public:
    float gain(int32_t token) const;  // log P(token | both) / P(token)
    // Up to kFrequent tokens: those that follow both most often, then those that follow the last.
    int frequent(std::array<int32_t, kFrequent>& tokens) const;

   private:
    friend class Ngrams;
    const Ngrams* all = nullptr;
    int row = -1, pair = -1;  // -1: unknown
  };
  After after(int32_t before, int32_t last) const;

  int32_t max_token() const { return max_token_; }

 private:
  struct Row {
    int64_t first = 0;  // in tokens_
    int count = 0;
    float unseen = 0.0f;
  };
  const float* find(const Row& row, int32_t token) const;  // null: not among them
  int row_of(int32_t token) const;
  int add_row(std::span<const int32_t> tokens, std::span<const int8_t> gains, float unseen);

  // Rows of contexts, then of pairs. Tokens of a row by id, so that they are found; the most
  // frequent once more.
  std::vector<Row> rows_;
  std::vector<int32_t> contexts_;  // rising; row i is that of contexts_[i]
  std::vector<int32_t> tokens_, pair_row_;
  int32_t max_token_ = -1;
  std::vector<float> gains_;
  std::vector<std::array<int32_t, kFrequent>> frequent_;
};

// How much each source counts; calibration fits it.
struct GuessModel {
  struct Head {
    float head = 1.0f, ngram = 0.0f, rest = 0.0f;
    std::vector<float> lookup;  // [kLookupNgram] by equal tokens, or empty
  };
  std::vector<Head> heads;
  // [kLookupNgram] how often the text's next token is right where so many before it were; empty
  // where the text takes no part.
  std::vector<float> chain;
  std::shared_ptr<const Ngrams> ngrams;  // may be null

  void check(int num_heads) const;  // ArgumentError
};

// What the text said before: the tokens that followed where its last `matched` tokens stood. At its
// end it goes on with itself, so that a text that repeats p tokens is guessed further than p.
struct Told {
  std::span<const int32_t> tokens;
  int matched = 0;  // 0: nothing

  int32_t at(int ahead) const { return tokens[static_cast<size_t>(ahead) % tokens.size()]; }
  int matched_at(int ahead) const {
    return matched + ahead < kLookupNgram ? matched + ahead : kLookupNgram;
  }
};
Told look_up(std::span<const int32_t> text);

// What a tree grows from.
struct GuessSources {
  std::span<const int32_t> text;  // the last token is the root
  // Of head h: candidates [width], best first, and their logits, at h * stride; -1 is none.
  const int32_t* ids = nullptr;
  const float* logits = nullptr;
  int64_t stride = 0;
  int width = 0, depth = 0;  // heads that ran
  Told told;
  const SamplingParams* noise = nullptr;  // whose draws will choose the tokens; null: greedy
};

// A token that may follow a node, and what is known of it.
struct Offer {
  int32_t token = 0;
  float log_share = 0.0f;  // of the head's candidates, in nats
  float gain = 0.0f;       // of the n-grams
  float noise = 0.0f;      // that will be added to its logit
  bool told = false;       // by the text
};

struct Offers {
  std::array<Offer, kMaxOffers> list;
  int count = 0;
  float other = 0.0f;  // log_share of what the head does not offer
};

// What the head of a depth offers below any node there.
Offers head_offers(const GuessSources& from, int depth);
// Adds what n-grams and text offer below a node whose token is `last`, before it `before`, and all
// gains; `on_told`: its path is what the text said.
void add_offers(const Ngrams* ngrams, const GuessSources& from, int depth, int32_t before,
                int32_t last, bool on_told, Offers& offers);

// Whether the text alone gives all nodes, so that heads need not run: the last of its guesses is
// likelier to be kept than the first to be wrong.
bool text_fills(const GuessModel& model, const Told& told, int max_nodes, int max_depth);

// Adds the most valuable nodes to a tree that is its root.
void grow(const GuessModel& model, const GuessSources& from, int max_nodes, int max_depth,
          DraftTree& tree);

// An answer of a text, and what heads [num_heads] offered after each of its tokens but the last.
// For calibration.
struct Answer {
  std::span<const int32_t> tokens;  // of the text
  int start = 0, end = 0;           // the answer in it
  const int32_t* ids = nullptr;     // [num_heads, rows, width]
  const float* logits = nullptr;
  int num_heads = 0, width = 0;

  int num_rows() const { return end - start - 1; }
  int32_t token(int index) const { return tokens[static_cast<size_t>(start + index)]; }
  GuessSources sources(int row) const {  // without what the text said
    const int64_t first = static_cast<int64_t>(row) * width;
    return {tokens.first(static_cast<size_t>(start + row + 1)),
            ids + first,
            logits + first,
            static_cast<int64_t>(num_rows()) * width,
            width,
            num_heads,
            {},
            nullptr};
  }
};

// The rows at which the steps of greedy decoding begin; the first token comes with the prefill.
std::vector<int> walk(const GuessModel& model, const Answer& answer, int max_nodes);

// What was offered where the tokens before are the answer's own. Of all rows and heads:
struct Judged {
  int num_offers = 0;                  // at most
  std::vector<float> log_share, gain;  // [rows, num_heads, num_offers], -inf: no offer
  std::vector<int8_t> right;           // [rows, num_heads] the answer's token; -1 not offered, -2
                                       // beyond the answer
  std::vector<int8_t> told, matched;   // the text's own, -1: none; how many tokens were equal
  std::vector<int8_t> found, kept;     // [rows] equal tokens, and how many that followed are right
};
Judged judge(const std::shared_ptr<const Ngrams>& ngrams, const Answer& answer, bool with_lookup);

}  // namespace medusa
