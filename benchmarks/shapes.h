// Shapes of models by name, for runs on random weights.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>
#include <string>

#include "medusa/config.h"
#include "medusa/error.h"

namespace medusa::bench {

inline ModelConfig make_config(int layers, int hidden, int heads, int kv_heads, int head_dim,
                               int mlp, int vocab, float rope_base) {
  ModelConfig config;
  config.family = "random";
  config.num_layers = layers;
  config.hidden_size = hidden;
  config.num_heads = heads;
  config.num_kv_heads = kv_heads;
  config.head_dim = head_dim;
  config.intermediate_size = mlp;
  config.vocab_size = vocab;
  config.max_context = 8192;
  config.tied_embeddings = true;
  config.windows.assign(static_cast<size_t>(layers), 0);
  for (int i = 0; i < head_dim; i += 2) {
    config.rope.inv_freq.push_back(
        std::pow(rope_base, -static_cast<float>(i) / static_cast<float>(head_dim)));
  }
  return config;
}

inline ModelConfig shape_config(const std::string& shape) {
  if (shape == "tiny") return make_config(4, 256, 4, 2, 64, 768, 1024, 1e4f);
  if (shape == "smollm2-135m") return make_config(30, 576, 9, 3, 64, 1536, 49152, 1e5f);
  if (shape == "llama-1b") return make_config(16, 2048, 32, 8, 64, 8192, 128256, 5e5f);
  throw ArgumentError("--shape: found \"" + shape + "\", wanted tiny, smollm2-135m or llama-1b");
}

}  // namespace medusa::bench
