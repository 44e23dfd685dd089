// Runs Medusa heads: hidden states in, each head's best tokens out.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <map>
#include <memory>
#include <vector>

#include "medusa/model.h"

namespace medusa {

class HeadRunner {
 public:
  // ArgumentError: the model has no heads, or they are stored in different types.
  explicit HeadRunner(std::shared_ptr<const Model> model);

  const Model& model() const { return *model_; }
  int num_heads() const { return model_->config.heads.num_heads; }
  int vocab_size() const { return head_vocab_; }  // tokens that a head chooses among

  struct Candidates {
    TensorView ids, values;  // [depth * B, width]; row h * B + b is head h of sequence b
  };
  // Candidates of the first `depth` heads for the rows of hidden [B, d] f32, backend memory; ids
  // are rows of the heads' vocabulary. May be recorded: memory that it used stays.
  Candidates run(TensorView hidden, int depth, int width);

  // The same from and to the host: rows of d f32, ids of the model's vocabulary.
  void read(const std::vector<const float*>& hidden, int depth, int width);
  std::vector<int32_t> ids;
  std::vector<float> values;

 private:
  Candidates compute(TensorView hidden, int depth, int width);
  void* memory(std::unique_ptr<Buffer>& buffer, int64_t num_bytes);
  TensorView repeated(int64_t batch, int64_t rows);

  std::shared_ptr<const Model> model_;
  Backend& ops_;
  int head_vocab_ = 0;
  bool recorded_ = false;
  // One Buffer per role, grown outside the ops.
  std::unique_ptr<Buffer> hidden_, u_, y_, copy_, last_, logits_, ids_, values_;
  std::map<int64_t, std::unique_ptr<Buffer>> indices_;  // by batch
  std::vector<std::unique_ptr<Buffer>> outgrown_;       // recorded steps may still use them
};

}  // namespace medusa
