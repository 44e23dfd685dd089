// Host memory: mapped, which costs nothing until it is touched, and scratch of a thread.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "medusa/backend.h"

namespace medusa::cpu {

// Zero-filled, page-aligned. huge_pages asks the system for 2 MiB pages. OutOfMemory says bytes
// asked and free.
std::unique_ptr<Buffer> map_memory(int64_t num_bytes, bool huge_pages);

// `count` elements of scratch that begin a cache line: vectors that lie across two cost twice. What
// the memory held may be lost.
template <class T>
T* at_least(std::vector<T>& memory, int64_t count) {
  constexpr size_t kLine = 64;
  static_assert(kLine % sizeof(T) == 0);
  const size_t room = static_cast<size_t>(count) + kLine / sizeof(T);
  if (memory.size() < room) memory.resize(room);
  return memory.data() + (-reinterpret_cast<uintptr_t>(memory.data()) % kLine) / sizeof(T);
}

}  // namespace medusa::cpu
