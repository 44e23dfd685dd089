// Verification on the CPU: which of a tree's tokens the model itself would have emitted.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "backend/cpu/kernels/kernels.h"
#include "medusa/backend.h"

namespace medusa::cpu {

// Room for the choice of one token, reused so that a step allocates nothing once it has run.
struct ChooseScratch {
  std::vector<float> scores;          // [V] penalised logits
  std::vector<uint64_t> seen;         // bit per vocabulary id: penalised already
  std::vector<int32_t> ids;           // candidates of a filter, rising
  std::vector<float> candidates;      // their scores
  std::vector<uint64_t> masses;       // what each weighs
  std::vector<uint64_t> histogram;    // sums of masses by score
  std::vector<int32_t> order;         // candidates at the border, the greater first
  std::vector<double> probabilities;  // of typical acceptance
};

// The token that the model itself emits at `position` (0-based index in the text), by the rule of
// docs/exactness.md.
//   logits [V] f32, penalised by the caller where a repetition penalty is set
//   Traffic: one pass over the logits, two with noise, one or two more for a filter; noise is made
//   only for ids that it could still make the winner.
int32_t choose_token(const Kernels& kernels, const float* logits, int64_t vocab,
                     const SamplingParams& sampling, uint32_t position, ChooseScratch& scratch);

// Fills item.accepted by the exact walk or by typical acceptance.
//   logits [N, V] f32, all rows of the step
void verify_tree(const Kernels& kernels, const float* logits, int64_t vocab, const VerifyItem& item,
                 ChooseScratch& scratch);

}  // namespace medusa::cpu
