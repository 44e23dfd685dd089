// Shapes of models by name, for runs on random weights.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>
#include <string>
#include <vector>

#include "medusa/config.h"
#include "medusa/error.h"

namespace medusa::bench {

struct NamedShape {
  const char* name;
  int layers, hidden, heads, kv_heads, head_dim, mlp, vocab;
  bool tied;
  float rope_base;
};

constexpr NamedShape kShapes[] = {
    {"tiny", 4, 256, 4, 2, 64, 768, 1024, true, 1e4f},
    {"smollm2-135m", 30, 576, 9, 3, 64, 1536, 49152, true, 1e5f},
    {"llama-1b", 16, 2048, 32, 8, 64, 8192, 128256, true, 5e5f},
    {"llama-2-7b", 32, 4096, 32, 32, 128, 11008, 32000, false, 1e4f},
    {"llama-3-8b", 32, 4096, 32, 8, 128, 14336, 128256, false, 5e5f},
};
constexpr const char* kShapeNames = "tiny, smollm2-135m, llama-1b, llama-2-7b, llama-3-8b";

inline const NamedShape& find_shape(const std::string& name) {
  for (const NamedShape& shape : kShapes) {
    if (shape.name == name) return shape;
  }
  throw ArgumentError("--shape: found \"" + name + "\", wanted one of " + kShapeNames);
}

inline std::vector<NamedShape> find_shapes(const std::vector<std::string>& names) {
  std::vector<NamedShape> shapes;
  for (const std::string& name : names) shapes.push_back(find_shape(name));
  return shapes;
}

inline ModelConfig shape_config(const NamedShape& shape) {
  ModelConfig config;
  config.family = "random";
  config.num_layers = shape.layers;
  config.hidden_size = shape.hidden;
  config.num_heads = shape.heads;
  config.num_kv_heads = shape.kv_heads;
  config.head_dim = shape.head_dim;
  config.intermediate_size = shape.mlp;
  config.vocab_size = shape.vocab;
  config.max_context = 65536;
  config.tied_embeddings = shape.tied;
  config.windows.assign(static_cast<size_t>(shape.layers), 0);
  for (int i = 0; i < shape.head_dim; i += 2) {
    config.rope.inv_freq.push_back(
        std::pow(shape.rope_base, -static_cast<float>(i) / static_cast<float>(shape.head_dim)));
  }
  return config;
}

}  // namespace medusa::bench
