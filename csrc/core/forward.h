// One pass of the model over ragged rows, in the ops of Backend: the same function for every
// backend.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "medusa/backend.h"
#include "medusa/model.h"

namespace medusa {

// Activations of one pass, sized once for the most rows a step takes. Untouched parts cost no
// memory.
class Workspace {
 public:
  // max_logit_rows <= max_rows: rows whose logits are wanted.
  Workspace(const Model& model, int max_rows, int max_logit_rows);

  int64_t num_bytes() const;
  int max_rows() const { return max_rows_; }
  int max_logit_rows() const { return max_logit_rows_; }
  void* row_memory() const { return rows_; }  // RowBatch::bytes(max_rows())

 private:
  friend class Pass;
  int max_rows_, max_logit_rows_;
  std::vector<std::unique_ptr<Buffer>> buffers_;
  void* take(Backend& backend, int64_t num_bytes);
  void *x_, *normed_, *qkv_, *q_, *attention_, *gate_up_, *gated_, *cos_, *sin_;
  void *gathered_, *hidden_, *hidden_logit_, *logits_, *rows_;
};

struct PassInput {  // in backend memory, all i32
  Rows rows;
  TensorView prompt_len;   // [R], read by dynamic RoPE scaling
  TensorView hidden_rows;  // rows whose hidden state is wanted, rising
  // Of those, the ones whose logits are wanted too: indices into hidden_rows.
  TensorView logit_rows;
};

struct PassOutput {
  TensorView hidden;  // [hidden_rows, d] f32, after the final norm
  TensorView logits;  // [logit_rows, V] f32
};

// K and V of every row go to the cache; the views point into the workspace (backend memory) and
// last until the next pass.
PassOutput forward(const Model& model, KvCache& cache, const PassInput& input,
                   Workspace& workspace);

}  // namespace medusa
