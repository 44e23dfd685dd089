// Where guesses come from. The decode step knows this interface and no particular method.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <span>

#include "medusa/sampling.h"
#include "medusa/tree.h"

namespace medusa {

class Resident;

// One sequence that wants a tree. Pointers are valid during the call only.
struct DraftInput {
  int64_t request = 0;              // id that submit() returned
  std::span<const int32_t> tokens;  // prompt and all emitted tokens; the last one is the root
  const float* hidden = nullptr;    // [d] final norm of the last accepted node; null at first
                                    // and where needs_hidden() is false
  int max_nodes = 1;                // root included
  int max_depth = 0;                // deeper nodes could not be used (context or max_new_tokens)
  const SamplingParams* sampling = nullptr;
};

// A drafter serves one Session; its methods are called from step(), one at a time.
class Drafter {
 public:
  virtual ~Drafter() = default;
  // trees[i] is reset to the root of inputs[i]; adds at most max_nodes - 1 nodes. Guesses never
  // change the output.
  virtual void draft(std::span<const DraftInput> inputs, std::span<DraftTree> trees) = 0;
  // Whether DraftInput::hidden is read; where it is not, it stays null.
  virtual bool needs_hidden() const { return true; }
  // If needs_commit(): tokens that joined the text, prompt included, in order, and their hidden
  // rows [n, d]. `start` is the first one's index in the text; one before the end of what came
  // earlier means: go back there (a set-back).
  virtual bool needs_commit() const { return false; }
  virtual void on_commit(int64_t /*request*/, int /*start*/, std::span<const int32_t> /*tokens*/,
                         const float* /*hidden*/) {}
  virtual void on_finish(int64_t /*request*/) {}
  virtual int max_nodes() const = 0;  // of any tree it makes, root included

  // The static tree that draft_resident() fills on the device; null: drafting needs the host.
  virtual const TreeSpec* resident_tree() const { return nullptr; }
  // Part of a resident step, see medusa/resident.h: reads resident.hidden(), ends in fill_tree().
  virtual void draft_resident(Resident& /*resident*/, int /*batch*/) {}
};

}  // namespace medusa
