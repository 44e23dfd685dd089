// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <numeric>

#include "medusa/error.h"
#include "medusa/guesses.h"

namespace medusa {
namespace {

constexpr float kStep = 0.125f;  // of a gain, in nats

int64_t sum_of(const std::vector<int32_t>& counts) {
  int64_t sum = 0;
  for (const int32_t count : counts) {
    MEDUSA_CHECK_ARG(count >= 0, "ngrams: a count is ", count);
    sum += count;
  }
  return sum;
}

}  // namespace

Ngrams::Ngrams(const NgramArrays& arrays) : contexts_(arrays.contexts) {
  const size_t C = arrays.contexts.size(), E = arrays.tokens.size(), P = arrays.pair_tokens.size();
  MEDUSA_CHECK_ARG(arrays.counts.size() == C && arrays.unseen.size() == C &&
                       arrays.gains.size() == E && arrays.pair_counts.size() == E &&
                       arrays.pair_unseen.size() == E && arrays.pair_gains.size() == P &&
                       sum_of(arrays.counts) == static_cast<int64_t>(E) &&
                       sum_of(arrays.pair_counts) == static_cast<int64_t>(P),
                   "ngrams: arrays of ", C, " contexts, ", E, " successors and ", P,
                   " of pairs do not fit each other");
  for (size_t i = 1; i < C; ++i) {
    MEDUSA_CHECK_ARG(contexts_[i - 1] < contexts_[i], "ngrams: contexts do not rise");
  }
  tokens_.reserve(E + P);
  gains_.reserve(E + P);
  size_t at = 0;
  for (size_t i = 0; i < C; ++i) {
    const auto count = static_cast<size_t>(arrays.counts[i]);
    add_row(std::span(arrays.tokens).subspan(at, count), std::span(arrays.gains).subspan(at, count),
            kStep * static_cast<float>(arrays.unseen[i]));
    at += count;
  }
  // Successors stand by id in their row: where each of the file's went.
  pair_row_.assign(E, -1);
  size_t entry = 0, pair = 0;
  for (size_t i = 0; i < C; ++i) {
    const Row row = rows_[i];
    const auto ids =
        std::span(tokens_).subspan(static_cast<size_t>(row.first), static_cast<size_t>(row.count));
    for (int j = 0; j < row.count; ++j, ++entry) {
      const auto count = static_cast<size_t>(arrays.pair_counts[entry]);
      if (count == 0) continue;
      const auto where = std::lower_bound(ids.begin(), ids.end(), arrays.tokens[entry]);
      pair_row_[static_cast<size_t>(row.first + (where - ids.begin()))] =
          add_row(std::span(arrays.pair_tokens).subspan(pair, count),
                  std::span(arrays.pair_gains).subspan(pair, count),
                  kStep * static_cast<float>(arrays.pair_unseen[entry]));
      pair += count;
    }
  }
}

int Ngrams::add_row(std::span<const int32_t> tokens, std::span<const int8_t> gains, float unseen) {
  std::array<int32_t, kFrequent> frequent;
  frequent.fill(-1);
  std::copy_n(tokens.begin(), std::min(tokens.size(), frequent.size()), frequent.begin());
  frequent_.push_back(frequent);
  rows_.push_back({static_cast<int64_t>(tokens_.size()), static_cast<int>(tokens.size()), unseen});
  std::vector<size_t> order(tokens.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return tokens[a] < tokens[b]; });
  MEDUSA_CHECK_ARG(tokens.empty() || tokens[order.front()] >= 0, "ngrams: a token is ",
                   tokens.empty() ? 0 : tokens[order.front()]);
  if (!tokens.empty()) max_token_ = std::max(max_token_, tokens[order.back()]);
  for (const size_t i : order) {
    tokens_.push_back(tokens[i]);
    gains_.push_back(kStep * static_cast<float>(gains[i]));
  }
  return static_cast<int>(rows_.size()) - 1;
}

const float* Ngrams::find(const Row& row, int32_t token) const {
  const auto first = tokens_.begin() + row.first, end = first + row.count;
  const auto at = std::lower_bound(first, end, token);
  return at != end && *at == token ? &gains_[static_cast<size_t>(at - tokens_.begin())] : nullptr;
}

int Ngrams::row_of(int32_t token) const {
  const auto at = std::lower_bound(contexts_.begin(), contexts_.end(), token);
  return at != contexts_.end() && *at == token ? static_cast<int>(at - contexts_.begin()) : -1;
}

Ngrams::After Ngrams::after(int32_t before, int32_t last) const {
  After found;
  found.all = this;
  found.row = row_of(last);
  const int above = row_of(before);
  if (above < 0) return found;
  const float* entry = find(rows_[static_cast<size_t>(above)], last);
  if (entry != nullptr) found.pair = pair_row_[static_cast<size_t>(entry - gains_.data())];
  return found;
}

float Ngrams::After::gain(int32_t token) const {
  float gain = 0.0f;
  if (pair >= 0) {
    const Row& both = all->rows_[static_cast<size_t>(pair)];
    if (const float* known = all->find(both, token)) return *known;
    gain = both.unseen;
  }
  if (row < 0) return gain;
  const Row& one = all->rows_[static_cast<size_t>(row)];
  const float* known = all->find(one, token);
  return gain + (known != nullptr ? *known : one.unseen);
}

int Ngrams::After::frequent(std::array<int32_t, kFrequent>& tokens) const {
  int count = 0;
  for (const int from : {pair, row}) {
    if (from < 0) continue;
    for (const int32_t token : all->frequent_[static_cast<size_t>(from)]) {
      if (token < 0 || count == kFrequent) break;
      const auto end = tokens.begin() + count;
      if (std::find(tokens.begin(), end, token) == end)
        tokens[static_cast<size_t>(count++)] = token;
    }
  }
  return count;
}

}  // namespace medusa
