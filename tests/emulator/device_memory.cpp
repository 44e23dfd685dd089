// SPDX-License-Identifier: Apache-2.0
#include "emulator/device_memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

namespace emu {
namespace {

constexpr int kNan = 0xFF;  // every byte of it
constexpr size_t kAlignment = 256;
constexpr size_t kTailBytes = 256;  // after each block, at least
#if defined(__SANITIZE_ADDRESS__)
constexpr bool kFromMalloc = true;
#else
constexpr bool kFromMalloc = false;
#endif

size_t rounded(size_t num_bytes, size_t unit) { return (num_bytes + unit - 1) / unit * unit; }

[[noreturn]] void die(const char* what) {
  std::perror(what);
  std::abort();
}

}  // namespace

DeviceMemory::DeviceMemory(size_t capacity) : capacity_(capacity) {
  if (kFromMalloc) return;
  void* memory =
      mmap(nullptr, 2 * capacity, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) die("CUDA emulator: no addresses for device memory");
  base_ = static_cast<char*>(memory);
}

// The first gap that is large enough.
char* DeviceMemory::place(size_t num_bytes) {
  if (kFromMalloc) {  // of the exact size
    void* memory = nullptr;
    return posix_memalign(&memory, kAlignment, num_bytes) == 0 ? static_cast<char*>(memory)
                                                               : nullptr;
  }
  char* start = base_;
  const auto end_of = [](char* block, size_t bytes) {
    return block + rounded(bytes, kAlignment) + kTailBytes;
  };
  for (const auto& [block, bytes] : blocks_) {
    if (end_of(start, num_bytes) <= block) break;
    start = end_of(block, bytes);
  }
  const auto end = static_cast<size_t>(end_of(start, num_bytes) - base_);
  if (end > 2 * capacity_) return nullptr;
  return start;
}

void* DeviceMemory::allocate(size_t num_bytes) {
  if (num_bytes > free_bytes()) return nullptr;
  char* block = place(std::max<size_t>(num_bytes, 1));
  if (block == nullptr) return nullptr;
  open();
  std::memset(block, kNan, kFromMalloc ? num_bytes : rounded(num_bytes, kAlignment) + kTailBytes);
  blocks_[block] = num_bytes;
  used_ += num_bytes;
  static_cast<void>(close());
  return block;
}

bool DeviceMemory::release(void* memory) {
  const auto block = blocks_.find(static_cast<char*>(memory));
  if (block == blocks_.end()) return false;
  open();
  std::memset(memory, kNan, block->second);
  used_ -= block->second;
  blocks_.erase(block);
  static_cast<void>(close());
  if (kFromMalloc) std::free(memory);
  return true;
}

bool DeviceMemory::holds(const void* address, size_t num_bytes) const {
  char* start = static_cast<char*>(const_cast<void*>(address));
  auto block = blocks_.upper_bound(start);
  if (block == blocks_.begin()) return false;
  --block;
  return start + num_bytes <= block->first + block->second;
}

bool DeviceMemory::contains(const void* address) const {
  if (kFromMalloc) return holds(address, 0);
  const auto* byte = static_cast<const char*>(address);
  return byte >= base_ && byte < base_ + 2 * capacity_;
}

void DeviceMemory::open() {
  if (kFromMalloc || !closed_) return;
  // All of it at once: in this state a block that is added needs no call.
  if (mprotect(base_, 2 * capacity_, PROT_READ | PROT_WRITE) != 0) {
    die("CUDA emulator: no memory for the device");
  }
  closed_ = false;
}

std::string DeviceMemory::close() {
  if (kFromMalloc) return "";
  static const std::vector<char> nan_bytes(kAlignment + kTailBytes, static_cast<char>(kNan));
  std::string found;
  for (const auto& [block, bytes] : blocks_) {
    char* tail = block + bytes;
    const size_t tail_bytes = rounded(bytes, kAlignment) + kTailBytes - bytes;
    if (std::memcmp(tail, nan_bytes.data(), tail_bytes) == 0) continue;
    found = "written past the end of a block of " + std::to_string(bytes) + " bytes";
    std::memset(tail, kNan, tail_bytes);  // reported once
  }
  random_ = random_ * 1664525u + 1013904223u;
  if (random_ >> 25 == 0) {  // 1 of 128
    if (mprotect(base_, 2 * capacity_, PROT_NONE) != 0) {
      die("CUDA emulator: device memory cannot be closed");
    }
    closed_ = true;
  }
  return found;
}

}  // namespace emu
