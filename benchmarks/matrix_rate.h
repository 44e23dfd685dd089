// The rate of a CPU's multiply-adds in registers: the ceiling of its products.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <map>
#include <string>

namespace medusa::bench {

// TFLOP/s of all threads together, by what is multiplied: "f32", "bf16" and "int8" where the
// instruction set ("avx512" or "avx2") has instructions for it; empty for any other.
std::map<std::string, double> matrix_rates(const std::string& isa, int threads);

}  // namespace medusa::bench
