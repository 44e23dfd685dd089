// Whole decode steps on a device: the host starts lines, launches steps ahead of time, and reads
// what they emitted from a ring. Between steps nothing passes through the host. Optional: a backend
// that has none steps with the host in the loop, and gives the same tokens.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "medusa/backend.h"
#include "medusa/sampling.h"
#include "medusa/tree.h"

namespace medusa {

struct ResidentShape {
  int max_lines = 1;  // lines of the page table
  int hidden_size = 0, vocab_size = 0;
  TreeSpec tree;  // the same for every line
};

// A sequence that decodes: its prompt is in the cache but for the root, the last of `tokens`.
struct ResidentLine {
  int line = 0;                       // of the page table
  int prompt_len = 0, remaining = 0;  // remaining: tokens it may still emit, >= 1
  std::span<const int32_t> tokens;
  const SamplingParams* sampling = nullptr;
  std::span<const int32_t> eos_ids;  // at most kMaxResidentEos
  const float* hidden = nullptr;     // host [d]: final norm of the last accepted node
};

constexpr int kMaxResidentEos = 32;

class Resident {
 public:
  virtual ~Resident() = default;

  // In call order with the steps; the host memory may change on return.
  virtual void start(const ResidentLine& line) = 0;
  // The lines of the steps to come, one batch row each; a line that has ended does nothing.
  virtual void set_lines(std::span<const int> lines) = 0;
  // One step of this many rows of the batch. `body` calls the parts below and forward(); it is run
  // where this batch is new, recorded the second time and replayed from then on, so it must not
  // depend on anything but the batch. At most kMaxAhead steps may be unread.
  virtual void launch(int batch, const std::function<void()>& body) = 0;
  static constexpr int kMaxAhead = 2;

  // The parts of a step, in this order. B: the batch.
  virtual TensorView hidden(int batch) = 0;  // [B, d] f32, what heads read
  // ids, values [depth * B, width]: row (level - 1) * B + b holds the candidates of batch row b at
  // this level, best first; at temperature > 0 they are ranked again with the noise to come.
  // token_map [head_vocab] i32 or null.
  virtual void fill_tree(int batch, TensorView ids, TensorView values, TensorView token_map) = 0;
  struct PassRows {
    Rows rows;
    TensorView prompt_len, row_index;  // [B N] i32; row_index[i] = i
  };
  virtual PassRows build_rows(int batch) = 0;
  // logits [B N, V], hidden [B N, d] f32: walk, cut at the end of the text, compact the cache,
  // advance, keep the hidden rows of the last accepted nodes, publish.
  virtual void commit(int batch, TensorView logits, TensorView hidden, KvCache& cache) = 0;

  // What the oldest unread step emitted, one entry per row of its batch; waits for it. Empty
  // tokens: that line had ended before. ArgumentError: the logits of a line were not finite.
  virtual std::vector<Accepted> wait() = 0;
  // Of the step that wait() returned last, by the device's clock: how long it took, and how long
  // after the end of the one before it began.
  struct Times {
    double step_s = 0, gap_s = 0;
  };
  virtual Times times() const = 0;
  // Waits for all steps and forgets what they emitted; lines must be started anew.
  virtual void discard() = 0;
  // The hidden row [d] f32 that the line's next draft would read; no step may be unread.
  virtual void read_hidden(int line, float* hidden) = 0;
};

}  // namespace medusa
