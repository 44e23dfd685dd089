// How the next token is chosen: options of a request, and the result of walking a tree.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <vector>

namespace medusa {

enum class Acceptance : uint8_t { exact, typical };

struct SamplingParams {
  float temperature = 0.0f;         // 0: greedy
  int top_k = 0;                    // 0: off
  double top_p = 1.0;               // (0, 1]; 1: off
  double min_p = 0.0;               // [0, 1]; 0: off
  float repetition_penalty = 1.0f;  // > 0; 1: off
  uint64_t seed = 0;
  uint32_t sample_index = 0;  // which of several samples of one prompt
  Acceptance acceptance = Acceptance::exact;
  double epsilon = 0.09, delta = 0.3;  // typical acceptance only

  void check() const;  // ArgumentError names the field, the value and the allowed range
};

// What a walk through one tree accepted.
struct Accepted {
  std::vector<int> path;        // nodes, root first, strictly increasing
  std::vector<int32_t> tokens;  // emitted, one per node; the last one is the next root
};

}  // namespace medusa
