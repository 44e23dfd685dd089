// How the outside drives decoding: submit requests, step, read events. Safe from any thread.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "medusa/drafter.h"
#include "medusa/guesses.h"
#include "medusa/model.h"

namespace medusa {

struct SessionOptions {
  int max_batch = 8;    // sequences that decode side by side
  int max_context = 0;  // tokens, prompt and output together; 0: the model's
  // Of all sequences; 0: min(max_batch * max_context, 16384); at least one max_context.
  int64_t cache_tokens = 0;
  int prefill_chunk = 512;  // prompt rows a step takes at most
};

struct Request {
  std::vector<int32_t> tokens;  // at least one; at most max_context - 1
  int max_new_tokens = 0;       // 0: up to the context's end
  SamplingParams sampling;
  std::vector<int32_t> eos_ids;
  bool reuse_prefix = true;  // take K and V of the longest common prefix from earlier requests
};

enum class Finish : uint8_t { none, stop, length, cancelled };

struct RequestStats {
  int prompt_tokens = 0, reused_tokens = 0;  // reused: not computed again, at the first start
  int64_t steps = 0;                         // that emitted tokens
  int64_t set_backs = 0;
  std::vector<int64_t> accepted_lengths;  // [n]: steps that emitted n tokens
  double prefill_s = 0, decode_s = 0;     // seconds; prefill runs up to the first token
};

struct Event {
  int64_t request = 0;
  std::vector<int32_t> tokens;  // newly emitted, final
  Finish finish = Finish::none;
  RequestStats stats;  // filled with the last event
};

struct SessionStats {
  int active = 0, waiting = 0;
  int pages_used = 0, pages_total = 0, pages_cached = 0;  // cached: for reuse, freed on demand
  int64_t steps = 0, set_backs = 0, compactions_across_pages = 0;
  int64_t device_steps = 0;  // of the steps: with no host in between, see medusa/resident.h
  // Of the last of these, by the device's clock: its seconds, and those since the one before.
  double device_step_s = 0, device_gap_s = 0;
  int64_t weight_bytes = 0, cache_bytes = 0, workspace_bytes = 0;  // reserved
};

class Session {
 public:
  // drafter null: plain decoding.
  Session(std::shared_ptr<const Model> model, std::shared_ptr<Drafter> drafter,
          const SessionOptions& options);
  ~Session();
  int64_t submit(Request request);  // checks everything; ArgumentError before anything starts
  std::vector<Event> step();        // one pass; empty when there is nothing to do
  bool cancel(int64_t request);     // false: unknown or finished; step() gives its event
  bool idle() const;
  SessionStats stats() const;
  const SessionOptions& options() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// Logits [S, V] and hidden states after the final norm [S, d] of a text, f32, in chunks, with a
// cache of its own. Either may be null.
void score(const Model& model, std::span<const int32_t> tokens, int chunk, float* logits,
           float* hidden);

// Static trees of the heads' candidates.
std::shared_ptr<Drafter> make_medusa_drafter(std::shared_ptr<const Model> model,
                                             const TreeSpec& tree);
// Trees of up to max_nodes nodes, root included, that each step grows anew. Drafting needs the
// host.
std::shared_ptr<Drafter> make_dynamic_drafter(std::shared_ptr<const Model> model,
                                              GuessModel guesses, int max_nodes);

// What a step at temperature 0 would take from every head, best first, for texts whose last hidden
// states are hidden [R, d] f32: ids [num_heads, R, width] i32 and their logits f32. For
// calibration.
void head_candidates(std::shared_ptr<const Model> model, const float* hidden, int64_t num_rows,
                     int width, int32_t* ids, float* logits);

struct PromptLookupOptions {
  int max_ngram = 4, min_ngram = 2;
  int max_nodes = 16;   // root included
  int max_depth = 10;   // tokens proposed along one path
  int max_matches = 4;  // most recent ones, merged into one tree
};
std::shared_ptr<Drafter> make_prompt_lookup_drafter(const PromptLookupOptions& options);

}  // namespace medusa
