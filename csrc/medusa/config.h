// What a model is, in data: the canonical form that loaders produce and C++ reads. No model
// families here.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "medusa/tensor.h"

namespace medusa {

enum class Activation : uint8_t { silu, gelu, gelu_tanh };

// Rotary embedding: angle of pair i at position p is p * inv_freq[i], cos and sin times
// `attention_scaling`. `linear`, `llama3` and `yarn` scaling are baked into inv_freq by the loader.
// `dynamic` (dynamic_factor > 0) replaces inv_freq where n = max(prompt length, position + 1)
// exceeds original_context, by
//   base' = base * (factor * n / original - (factor - 1)) ^ (rotary_dim / (rotary_dim - 2)).
struct RopeConfig {
  std::vector<float> inv_freq;  // [rotary_dim / 2]; pairs are (i, i + rotary_dim / 2)
  float attention_scaling = 1.0f;
  float dynamic_factor = 0.0f;  // 0: off
  float base = 10000.0f;        // read only when dynamic
  int original_context = 0;     // read only when dynamic

  // JSON object with exactly these names, as it stands in ModelConfig's.
  static RopeConfig from_json(const std::string& text);
  std::string to_json() const;
  void check(int head_dim) const;
};

// Medusa heads: logits_h = W_h u_L, u_0 = x, u_{l+1} = u_l + silu(A_{h,l} u_l + b_{h,l}); x is the
// hidden state after the final norm. Head h at position t predicts the token at t + 2 + h.
struct HeadsConfig {
  int num_heads = 0;  // 0: the model has none
  int num_layers = 0;
  // W_h is the base model's lm_head, or the tensor heads.draft_lm_head: a copy of some of its rows.
  bool shared_lm_head = true;
  // Rows of W_h, 0: all of a shared one. Below vocab_size heads.token_map names their ids.
  int head_vocab = 0;

  // Whether heads guess some tokens only.
  bool cut(int vocab_size) const {
    return num_heads > 0 && head_vocab > 0 && head_vocab < vocab_size;
  }
};

struct ModelConfig {
  std::string family;  // for display only; nothing branches on it
  int vocab_size = 0, hidden_size = 0, intermediate_size = 0;
  int num_layers = 0, num_heads = 0, num_kv_heads = 0, head_dim = 0;
  int max_context = 0;  // tokens
  float rms_norm_eps = 1e-6f;
  Activation activation = Activation::silu;
  bool qkv_bias = false, o_bias = false, mlp_bias = false;
  bool qk_norm = false;  // RMSNorm over head_dim on each q and k head, before RoPE
  bool tied_embeddings = false;
  float embedding_scale = 1.0f;
  float attention_scale = 0.0f;  // 0: 1 / sqrt(head_dim)
  std::vector<int> windows;      // [num_layers], tokens a query sees including itself; 0: all
  RopeConfig rope;
  HeadsConfig heads;

  // JSON object with exactly these names; unknown or missing keys, wrong types and impossible
  // values are ArgumentErrors.
  static ModelConfig from_json(const std::string& text);
  std::string to_json() const;
  void check() const;
};

}  // namespace medusa
