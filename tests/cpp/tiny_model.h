// A random model small enough for thousands of steps under a sanitizer.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>
#include <memory>

#include "medusa/backend.h"
#include "medusa/model.h"

namespace test {

inline medusa::ModelConfig tiny_config(int max_context = 256) {
  medusa::ModelConfig config;
  config.family = "test";
  config.vocab_size = 61;
  config.hidden_size = 32;
  config.intermediate_size = 48;
  config.num_layers = 2;
  config.num_heads = 4;
  config.num_kv_heads = 2;
  config.head_dim = 8;
  config.max_context = max_context;
  config.windows = {0, 0};
  for (int i = 0; i < 4; ++i)
    config.rope.inv_freq.push_back(std::pow(100.0f, -0.25f * static_cast<float>(i)));
  config.heads.num_heads = 3;
  config.heads.num_layers = 1;
  return config;
}

inline std::shared_ptr<const medusa::Model> tiny_model(
    int threads = 2, medusa::DType dtype = medusa::DType::f32,
    const medusa::ModelConfig& config = tiny_config()) {
  return medusa::random_model(config, dtype, 11, medusa::make_backend({"cpu", threads, ""}));
}

}  // namespace test
