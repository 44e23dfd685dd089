// The decode step's own state in device memory, and the small kernels between the passes, so that
// no host stands between two steps (medusa/resident.h):
//
//   gather_hidden what the heads read
//   fill_tree     the trees' tokens, from the heads' candidates
//   build_rows    the rows of every tree, from its line's length and text
//   ...           the pass, launch_verify with verify_args(), compact_kv with moves()
//   advance       the only writer of len, the root and what remains; a line may end
//   keep_hidden   the hidden rows that the next draft reads
//   publish       what was accepted, to the ring that the host reads
//
// A line is a line of the page table, with state that lasts; a step runs over a batch of them,
// batch row b being line lines[b]. All trees have one static shape of N nodes: row b * N + node.
// Shapes and pointers are fixed when a step is captured; everything else is read from here.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <memory>
#include <span>

#include "backend/cuda/cache_ops.h"
#include "backend/cuda/runtime.h"
#include "backend/cuda/verify_state.h"
#include "medusa/backend.h"
#include "medusa/noise.h"
#include "medusa/resident.h"
#include "medusa/tree.h"

namespace medusa::cuda {

// The static tree in device memory. Nodes are in order of depth, so that each depth is a range.
struct DeviceTree {
  int num_nodes = 1, depth = 0;
  int32_t* rank = nullptr;            // [N] among the candidates of its depth
  int32_t* node_depth = nullptr;      // [N]
  int32_t* first_node = nullptr;      // [depth + 2] of each depth; the last one is N
  AncestorBits* ancestors = nullptr;  // [N]
};

// Plain, so that kernels take it by value. All arrays are device memory.
struct StepState {
  int num_lines = 0;          // L
  int64_t hidden_size = 0;    // d
  int64_t history_words = 0;  // ceil(V / 32)
  DeviceTree tree;

  // Of a line: written by start_line, then by advance, the walk (history) and keep_hidden.
  int32_t* active = nullptr;      // [L] 1: decodes; 0: has ended, or was never started
  int32_t* len = nullptr;         // [L] tokens whose K and V are in the cache
  int32_t* root = nullptr;        // [L] the last token emitted, at position len
  LineState* states = nullptr;    // [L]
  uint32_t* history = nullptr;    // [L, history_words]
  float* hidden = nullptr;        // [L, d]
  int32_t* prompt_len = nullptr;  // [L]
  LineParams* params = nullptr;   // [L]
  int32_t* eos_ids = nullptr;     // [L, kMaxResidentEos]

  // Of a batch row, of one step.
  int32_t* lines = nullptr;        // [L] of the page table, by set_lines
  int32_t* root_len = nullptr;     // [L] len before the step, by build_rows
  TreeRows* trees = nullptr;       // [L] by build_rows: the nodes that live, a prefix of the tree's
  int32_t* tree_tokens = nullptr;  // [L, N] by fill_tree; the root's by build_rows
  WalkResult* results = nullptr;   // [L] by the walk, and cleared by build_rows
  int32_t* path = nullptr;         // [L, N] by the walk
  int32_t* path_tokens = nullptr;  // [L, N] by the walk
  int32_t* last_row = nullptr;     // [L] row of the path's last node, by advance; -1: none
  float* batch_hidden = nullptr;   // [L, d] by gather_hidden
  int32_t* parents = nullptr;      // [L, N] and ancestors [L, N]: the tree for each row, constant
  AncestorBits* ancestors = nullptr;

  // Of a row: [L * N] each.
  int32_t *row_token = nullptr, *row_sequence = nullptr, *row_position = nullptr,
          *row_slot = nullptr, *row_prefix_len = nullptr, *row_prompt_len = nullptr,
          *row_index = nullptr;  // row_index[i] = i
  AncestorBits* row_ancestors = nullptr;

  uint64_t* num_steps = nullptr;  // [1] published
  uint64_t* began = nullptr;      // [1] when the step under way did; 0: none is

  Resident::PassRows pass_rows(int batch) const;
  VerifyArgs verify_args(int batch) const;  // all but logits, needs and the memory for work
  DeviceMoves moves(int batch) const;       // for compact_kv, between the walk and advance
};

// The state and its memory; no line is active.
class OwnedStepState {
 public:
  OwnedStepState(const ResidentShape& shape, Staging& staging, cudaStream_t stream);
  const StepState& view() const { return view_; }
  int64_t num_bytes() const { return memory_->num_bytes(); }

 private:
  std::unique_ptr<DeviceBuffer> memory_;
  StepState view_;
};

// All of these are enqueued in call order; batch <= num_lines.
void start_line(const StepState& state, const ResidentLine& line, Staging& staging,
                cudaStream_t stream);
void set_lines(const StepState& state, std::span<const int> lines, Staging& staging,
               cudaStream_t stream);

// The hidden rows [B, d] of the batch's lines, which heads read.
TensorView gather_hidden(const StepState& state, int batch, cudaStream_t stream);

// ids, values [depth * B, width]: row (level - 1) * B + b, best first, width <= 256. At a
// temperature > 0 they are ranked by logit / temperature + the noise that will choose the token at
// their position. token_map i32 or null.
void fill_tree(const StepState& state, int batch, TensorView ids, TensorView values,
               TensorView token_map, cudaStream_t stream);

// Rows of a line that has ended, and of nodes too deep for what may still be emitted, touch
// nothing: sequence -1, no prefix, no ancestors.
void build_rows(const StepState& state, int batch, cudaStream_t stream);

void advance(const StepState& state, int batch, cudaStream_t stream);

// hidden [B N, d] f32, of the pass.
void keep_hidden(const StepState& state, int batch, TensorView hidden, cudaStream_t stream);

// When a step's first kernel began and its last one published, in nanoseconds of the device.
struct StepTimes {
  uint64_t began = 0, ended = 0;
};

// Pinned host memory that the device writes and the host polls. Entry (step % num_entries) holds
// step + 1 once it is complete, its times, and for every batch row the result, the path and the
// tokens. The host may have num_entries steps unread, no more.
struct Ring {
  char* device_memory = nullptr;
  int num_entries = 0, num_lines = 0, num_nodes = 0;

  static constexpr int kResultInts = sizeof(WalkResult) / sizeof(int32_t);
  static constexpr int64_t kRowsAt = sizeof(uint64_t) + sizeof(StepTimes);  // bytes
  MEDUSA_HD int64_t row_ints() const { return kResultInts + 2 * int64_t{num_nodes}; }
  MEDUSA_HD int64_t entry_bytes() const {
    return (kRowsAt + num_lines * row_ints() * 4 + 63) / 64 * 64;
  }
};

class PinnedRing {
 public:
  PinnedRing(int num_entries, int num_lines, int num_nodes);
  ~PinnedRing();
  PinnedRing(const PinnedRing&) = delete;
  PinnedRing& operator=(const PinnedRing&) = delete;
  const Ring& view() const { return view_; }

  // Whether step `step` (from 0) is there. Never waits.
  bool has(uint64_t step) const;
  struct Row {
    WalkResult result;  // idle: the line had ended before
    std::span<const int32_t> path, tokens;
  };
  Row row(uint64_t step, int b) const;  // of a step that is there
  StepTimes times(uint64_t step) const;

 private:
  const char* entry(uint64_t step) const;
  char* memory_ = nullptr;
  Ring view_;
};

void publish(const StepState& state, int batch, const Ring& ring, cudaStream_t stream);

}  // namespace medusa::cuda
