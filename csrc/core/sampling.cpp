// SPDX-License-Identifier: Apache-2.0
#include "medusa/sampling.h"

#include <cmath>

#include "medusa/error.h"

namespace medusa {

void SamplingParams::check() const {
  // Wider ranges would only overflow f32 logits.
  MEDUSA_CHECK_ARG(temperature == 0.0f || (temperature >= 1e-6f && temperature <= 1e6f),
                   "temperature is ", temperature, ", allowed is 0 (greedy) or 1e-6 to 1e6");
  MEDUSA_CHECK_ARG(top_k >= 0, "top_k is ", top_k, ", allowed is 0 (off) or a positive number");
  MEDUSA_CHECK_ARG(top_p > 0.0 && top_p <= 1.0, "top_p is ", top_p,
                   ", allowed is above 0 and at most 1 (off)");
  MEDUSA_CHECK_ARG(min_p >= 0.0 && min_p <= 1.0, "min_p is ", min_p, ", allowed is 0 (off) to 1");
  MEDUSA_CHECK_ARG(repetition_penalty >= 1e-3f && repetition_penalty <= 1e3f,
                   "repetition_penalty is ", repetition_penalty,
                   ", allowed is 0.001 to 1000 (1 is off)");
  MEDUSA_CHECK_ARG(epsilon >= 0.0 && epsilon <= 1.0, "epsilon is ", epsilon, ", allowed is 0 to 1");
  MEDUSA_CHECK_ARG(std::isfinite(delta) && delta >= 0.0, "delta is ", delta,
                   ", allowed is 0 or a positive number");
}

}  // namespace medusa
