// A loaded model: configuration and weights in the backend's layout, with its Medusa heads if it
// has any.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "medusa/backend.h"
#include "medusa/config.h"

namespace medusa {

struct Layer {
  // f32; null where the model has none.
  std::unique_ptr<Buffer> attn_norm, mlp_norm, q_norm, k_norm;
  std::unique_ptr<Buffer> qkv_bias, o_bias, gate_up_bias, down_bias;
  std::unique_ptr<Weight> qkv, o, gate_up, down;
};

struct Head {
  std::vector<std::unique_ptr<Weight>> blocks;  // [num_layers] of [d, d]
  std::vector<std::unique_ptr<Buffer>> biases;  // [num_layers] of [d] f32
  std::unique_ptr<Weight> lm_head;              // null: the model's own
};

struct Model {
  ModelConfig config;
  DType dtype = DType::f32;  // of the cache, and of weights that are not in blocks
  std::shared_ptr<Backend> backend;
  std::unique_ptr<Weight> embedding, lm_head;  // lm_head null where tied
  std::unique_ptr<Buffer> final_norm;
  std::vector<Layer> layers;
  std::vector<Head> heads;
  // Rows of output() that heads without an lm_head of their own choose among; null: all.
  std::unique_ptr<Weight> draft_lm_head;
  std::vector<int32_t> token_map;  // [head_vocab] ids of the heads' rows; empty: the identity
  std::vector<int32_t> eos_ids;    // that end a text, as an exported file says; else empty

  const Weight& output() const { return lm_head ? *lm_head : *embedding; }
  const Weight& draft_output() const { return draft_lm_head ? *draft_lm_head : output(); }
  int64_t weight_bytes() const;  // resident
  KvShape kv_shape(int num_pages) const;
};

struct TensorSpec {
  std::string name;
  std::vector<int64_t> shape;
};

// Takes tensors one at a time, in any order, and packs each at once, so that no second copy of the
// weights exists.
//   embed_tokens.weight [V, d]   norm.weight [d]   lm_head.weight [V, d] (absent where tied)
//   layers.{i}.attn_norm.weight, layers.{i}.mlp_norm.weight [d]
//   layers.{i}.{q,k,v}_proj.weight [H D | Hkv D, d] (.bias)   layers.{i}.{q,k}_norm.weight [D]
//   layers.{i}.o_proj.weight [d, H D] (.bias)
//   layers.{i}.{gate,up}_proj.weight [F, d] (.bias)   layers.{i}.down_proj.weight [d, F] (.bias)
//   heads.{h}.{l}.weight [d, d], heads.{h}.{l}.bias [d]
//   heads.{h}.lm_head.weight [head_vocab, d] (absent where shared)
//   heads.draft_lm_head.weight [head_vocab, d] (only where shared and 0 < head_vocab < V)
//   heads.token_map [head_vocab] i32 (only where 0 < head_vocab < V)
class ModelBuilder {
 public:
  // blocks: block types by tensor name; matrices not named are stored as `dtype`. Tensors that are
  // stacked in one matrix (q, k and v; gate and up) must agree, else ArgumentError.
  ModelBuilder(ModelConfig config, DType dtype, std::shared_ptr<Backend> backend,
               const std::map<std::string, DType>& blocks = {});
  ~ModelBuilder();
  // ArgumentError names the tensor: unknown, given twice, wrong shape (found and wanted), wrong
  // dtype.
  void add(const std::string& name, TensorView tensor);
  std::vector<TensorSpec> missing() const;  // what add() still waits for, by name
  std::unique_ptr<Model> finish();          // ArgumentError names every missing tensor

 private:
  struct Slot;
  struct State;
  std::unique_ptr<State> state_;
};

// The one file that `medusa-ext export` writes: safetensors with the tensors above and, in its
// metadata, the keys "medusa_ext.format" ("1"), "medusa_ext.config" (ModelConfig as JSON) and, if
// known, "medusa_ext.eos_ids" (a JSON array), "medusa_ext.dtype" and "medusa_ext.blocks" (a JSON
// object: block type by tensor, each of which is U8 [rows, bytes] and stays in its blocks); further
// keys are the tokenizer's and ignored here.
// dtype, of what is not in blocks, nullopt: as "medusa_ext.dtype" says, else as the embedding.
std::unique_ptr<Model> load_model(const std::string& path, std::optional<DType> dtype,
                                  std::shared_ptr<Backend> backend);

// Random weights of this shape, for benchmarks and tests. weights: block type of all matrices whose
// rows whole blocks fill; nullopt: `dtype`.
std::unique_ptr<Model> random_model(const ModelConfig& config, DType dtype, uint64_t seed,
                                    std::shared_ptr<Backend> backend,
                                    std::optional<DType> weights = std::nullopt);

}  // namespace medusa
