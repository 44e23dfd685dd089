// Prompt lookup: the text so far proposes its own continuation. Runs on the host and needs no
// weights. Source: A. Saxena, Prompt Lookup Decoding, 2023 (also transformers'
// prompt_lookup_num_tokens).
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <vector>

#include "medusa/error.h"
#include "medusa/lookup.h"
#include "medusa/session.h"

namespace medusa {
namespace {

// How many of the last tokens before `end` and of the text's last ones are equal, both inclusive.
int common_tokens(std::span<const int32_t> text, int end, int most) {
  const auto last = static_cast<int>(text.size()) - 1;
  int length = 0;
  while (length < most && length <= end &&
         text[static_cast<size_t>(end - length)] == text[static_cast<size_t>(last - length)]) {
    ++length;
  }
  return length;
}

class PromptLookupDrafter final : public Drafter {
 public:
  explicit PromptLookupDrafter(const PromptLookupOptions& options) : options_(options) {}

  void draft(std::span<const DraftInput> inputs, std::span<DraftTree> trees) override {
    for (size_t i = 0; i < inputs.size(); ++i) draft_one(inputs[i], trees[i]);
  }
  int max_nodes() const override { return options_.max_nodes; }
  bool needs_hidden() const override { return false; }

 private:
  // Earlier places where the last tokens of the text stand, the longest first, then the most
  // recent.
  std::vector<Match> matches(std::span<const int32_t> text) const {
    std::vector<Match> found;
    const int last = static_cast<int>(text.size()) - 1;
    for (int end = last - 1; end >= 0; --end) {
      const int length = common_tokens(text, end, options_.max_ngram);
      if (length >= options_.min_ngram) found.push_back({length, end + 1});
    }
    std::stable_sort(found.begin(), found.end(),
                     [](const Match& a, const Match& b) { return a.length > b.length; });
    if (static_cast<int>(found.size()) > options_.max_matches) {
      found.resize(static_cast<size_t>(options_.max_matches));
    }
    return found;
  }

  void draft_one(const DraftInput& input, DraftTree& tree) const {
    const int max_nodes = std::min(input.max_nodes, options_.max_nodes);
    const int max_depth = std::min(input.max_depth, options_.max_depth);
    const std::span<const int32_t> text = input.tokens;
    for (const Match& match : matches(text)) {
      int node = 0;
      for (int depth = 0; depth < max_depth; ++depth) {
        const auto index = static_cast<size_t>(match.next + depth);
        if (index >= text.size()) break;
        const int known = tree.find_child(node, text[index]);
        if (known < 0 && tree.num_nodes() >= max_nodes) return;
        node = known >= 0 ? known : tree.add(node, text[index]);
      }
    }
  }

  PromptLookupOptions options_;
};

}  // namespace

Match latest_match(std::span<const int32_t> text, int max_ngram) {
  Match best;
  for (int end = static_cast<int>(text.size()) - 2; end >= 0 && best.length < max_ngram; --end) {
    const int length = common_tokens(text, end, max_ngram);
    if (length > best.length) best = {length, end + 1};
  }
  return best;
}

std::shared_ptr<Drafter> make_prompt_lookup_drafter(const PromptLookupOptions& options) {
  MEDUSA_CHECK_ARG(options.min_ngram >= 1 && options.min_ngram <= options.max_ngram,
                   "prompt lookup: min_ngram ", options.min_ngram, " and max_ngram ",
                   options.max_ngram, " given, wanted 1 <= min_ngram <= max_ngram");
  MEDUSA_CHECK_ARG(options.max_nodes >= 2 && options.max_nodes <= kMaxTreeNodes,
                   "prompt lookup: max_nodes is ", options.max_nodes, ", allowed is 2 to ",
                   kMaxTreeNodes);
  MEDUSA_CHECK_ARG(options.max_depth >= 1, "prompt lookup: max_depth is ", options.max_depth,
                   ", allowed is 1 or more");
  MEDUSA_CHECK_ARG(options.max_matches >= 1, "prompt lookup: max_matches is ", options.max_matches,
                   ", allowed is 1 or more");
  return std::make_shared<PromptLookupDrafter>(options);
}

}  // namespace medusa
