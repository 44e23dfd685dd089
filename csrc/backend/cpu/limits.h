// What this process may use of the machine: its own affinity and the limits of its container.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string_view>

namespace medusa::cpu {

int usable_processors();  // at least 1

int64_t usable_memory();  // bytes: the machine's, or less where a container limits it
int64_t free_memory();    // bytes of those that nobody has taken now

// Processors that a quota of `quota` microseconds in every `period` pays for, rounded up; 0: no
// limit ("max", "-1" or anything that is not two positive numbers).
int quota_processors(std::string_view quota, std::string_view period);

}  // namespace medusa::cpu
