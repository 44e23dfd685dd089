// Host memory that costs nothing until it is touched.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <memory>

#include "medusa/backend.h"

namespace medusa::cpu {

// Zero-filled, page-aligned. huge_pages asks the system for 2 MiB pages. OutOfMemory says bytes
// asked and free.
std::unique_ptr<Buffer> map_memory(int64_t num_bytes, bool huge_pages);

}  // namespace medusa::cpu
