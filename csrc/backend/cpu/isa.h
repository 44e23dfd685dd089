// Which instruction sets the kernels were built for, and which one this process uses.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <vector>

#include "backend/cpu/kernels/kernels.h"

namespace medusa::cpu {

// Built in and usable on this machine, slowest first; "generic" is always there.
std::vector<std::string> available_isas();

// The kernels of this name; "" means the environment variable MEDUSA_CPU_ISA, else the best.
// ArgumentError names those available.
const Kernels& select_kernels(const std::string& isa);

}  // namespace medusa::cpu
