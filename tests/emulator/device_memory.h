// The emulated device's memory: one range of addresses, filled with NaN where it is fresh or
// released, and after every block. Now and then the host cannot touch it but while a kernel or a
// copy runs: host code that takes device memory for its own dies of it. (Not always, as that costs
// two slow system calls per launch; whoever does it does it often.)
//
// Under the address sanitizer every block comes from malloc instead: the sanitizer then sees every
// access past its end, and the host may touch it.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>

namespace emu {

class DeviceMemory {
 public:
  explicit DeviceMemory(size_t capacity);
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;

  size_t capacity() const { return capacity_; }
  size_t free_bytes() const { return capacity_ - used_; }
  void* allocate(size_t num_bytes);  // 256-byte aligned; null if there is no room
  bool release(void* block);         // false if it is none
  // Whether all of [address, address + num_bytes) lies in one block.
  bool holds(const void* address, size_t num_bytes) const;

  // Whether this is, or was, or may become device memory.
  bool contains(const void* address) const;

  // Between open() and close() the memory can be touched. close() tells whether something was
  // written past the end of a block.
  void open();
  std::string close();

 private:
  char* place(size_t num_bytes);

  size_t capacity_ = 0, used_ = 0;
  char* base_ = nullptr;
  bool closed_ = true;
  uint32_t random_ = 1;             // decides whether close() does
  std::map<char*, size_t> blocks_;  // start, bytes
};

}  // namespace emu
