// What the choosing kernels read and write, all of it in device memory: between two replays of a
// captured graph only the memory changes, never a kernel's arguments.
//
//   launch_choose    the model's own token at every node         choose.cu
//   launch_filter    the same where top-k, top-p or min-p is on  filter.cu
//   launch_typical   the deepest path of typical tokens          typical.cu
//   launch_walk      path, tokens, how the walk ended            verify.cu
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "medusa/sampling.h"
#include "medusa/tree.h"

namespace medusa::cuda {

// A sequence's options, from its start to its end.
struct LineParams {
  uint64_t seed;
  double top_p, min_p, epsilon, delta;
  float temperature, repetition_penalty;
  uint32_t sample_index;
  int32_t top_k, typical;
  int32_t first_eos, num_eos;  // of eos_ids
};

LineParams line_params(const SamplingParams& sampling, int first_eos, int num_eos);

// What each step changes.
struct LineState {
  uint32_t position;  // of the token that follows the root
  int32_t remaining;  // tokens that it may still emit, >= 1
};

// The tree of one row of the batch: node v is row first_row + v of the logits.
struct TreeRows {
  int32_t first_row, num_nodes;  // no nodes: nothing is done for it
};

enum class WalkStatus : int32_t {
  idle,         // no nodes
  goes_on,      // the last node has no child with the token chosen there
  end_of_text,  // an end-of-sequence token was emitted
  full,         // as many tokens as were allowed
  broken,       // a node that was visited holds no finite maximum
};

struct WalkResult {
  WalkStatus status;
  int32_t num_tokens;        // emitted; before the broken node, if there is one
  int32_t next_root;         // the last token; -1: none
  int32_t last_node;         // the last node of the path; -1: none
  uint32_t broken_position;  // of the token that the broken node should have given
};

// The best of one chunk of a row, as ranks (choose.cuh).
struct ChoicePart {
  uint64_t top;    // of the scores
  uint64_t noisy;  // of score / temperature + noise, where no filter is on
};

// Which lines there may be. Kernels that none of them needs are not launched.
struct VerifyNeeds {
  bool penalty = false, filters = false, typical = false;
  VerifyNeeds& operator|=(const VerifyNeeds& other) {
    penalty |= other.penalty, filters |= other.filters, typical |= other.typical;
    return *this;
  }
};
VerifyNeeds needs_of(const SamplingParams& sampling, int64_t vocab);

// B rows of the batch, trees of up to `max_nodes` nodes.
struct VerifyArgs {
  const float* logits = nullptr;  // [N, V]
  int64_t vocab = 0;
  int batch = 0, max_nodes = 0;
  VerifyNeeds needs;

  const int32_t* lines = nullptr;       // [B] line of each row of the batch; null: its own number
  const LineParams* params = nullptr;   // [lines]
  const LineState* states = nullptr;    // [lines]
  const int32_t* eos_ids = nullptr;     // of all lines
  uint32_t* history = nullptr;          // [lines, ceil(V / 32)] bit t % 32 of word t / 32: the text
                                        // up to the root holds token t; the walk adds what it emits
  const TreeRows* trees = nullptr;      // [B]
  const int32_t* token = nullptr;       // [B, max_nodes]
  const int32_t* parent = nullptr;      // [B, max_nodes]
  const uint64_t* ancestors = nullptr;  // [B, max_nodes, kAncestorWords] itself included

  // Between the kernels; see set_verify_work.
  ChoicePart* parts = nullptr;     // [B, max_nodes, chunks]
  uint32_t* penalised = nullptr;   // [B, max_nodes, ceil(V / 32)]
  int32_t* filtered = nullptr;     // [B, max_nodes] token, where a filter is on
  double* totals = nullptr;        // [B, max_nodes, chunks] sums of exp
  double* entropies = nullptr;     // [B, max_nodes, chunks]
  int32_t* typical_end = nullptr;  // [B] last node of the path

  WalkResult* results = nullptr;   // [B]
  int32_t* path = nullptr;         // [B, max_nodes] nodes, root first
  int32_t* path_tokens = nullptr;  // [B, max_nodes] emitted
};

// Divides `memory`, 256-byte aligned, among the arrays between the kernels; returns how many bytes
// they take. Null only counts. vocab, batch, max_nodes and needs are set before.
int64_t set_verify_work(VerifyArgs& args, void* memory);

// All kernels, in order. Capturable.
void launch_verify(const VerifyArgs& args, cudaStream_t stream);

void launch_choose(const VerifyArgs& args, cudaStream_t stream);
void launch_filter(const VerifyArgs& args, cudaStream_t stream);
void launch_typical(const VerifyArgs& args, cudaStream_t stream);
void launch_walk(const VerifyArgs& args, cudaStream_t stream);

// ArgumentError with the words of every backend.
[[noreturn]] void throw_broken_logits(uint32_t position);

}  // namespace medusa::cuda
