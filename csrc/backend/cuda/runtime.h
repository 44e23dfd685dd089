// The CUDA runtime as this backend uses it: errors, move-only handles, memory. No device code.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "medusa/backend.h"
#include "medusa/error.h"

namespace medusa::cuda {

// Throws CudaError: expression, error name and text, file:line.
void check(cudaError_t status, const char* expression, const char* file, int line);

#define CUDA_CHECK(expression) ::medusa::cuda::check((expression), #expression, __FILE__, __LINE__)

// False where the environment variable is 0: switches for finding faults.
//   MEDUSA_CUDA_OVERLAP  kernels may start while the one before them runs
//   MEDUSA_CUDA_GRAPHS   steps are recorded and replayed
bool enabled(const char* name);

// Why `device` cannot be used; empty if it can.
std::string why_unusable(int device);

// Whether the code of this kernel that the current device runs was compiled for overlapped
// launches: code without grid_dependency_wait() must not be launched so.
bool may_overlap(const void* kernel);

class Stream {
 public:
  explicit Stream(int device);
  ~Stream();
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  // The stream; its device becomes the calling thread's current one, as every call of the runtime
  // wants it.
  cudaStream_t get() const;
  void synchronize() const;
  // The same for destructors: what a failed device says is ignored.
  void drain() const noexcept;

 private:
  int device_ = 0;
  cudaStream_t stream_ = nullptr;
};

// Memory of the current device, zero-filled, 256-byte aligned. OutOfMemory.
class DeviceBuffer final : public Buffer {
 public:
  explicit DeviceBuffer(int64_t num_bytes);
  ~DeviceBuffer() override;
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;
};

// Device memory that one op needs between its kernels. Grows outside captures only; what a captured
// graph may still point to is kept until the backend goes.
class Scratch {
 public:
  // 256-byte aligned; contents are whatever the last use left, zeros at first. InternalError while
  // the stream captures and the memory is too small: run the same shapes once before.
  void* at_least(int64_t num_bytes, cudaStream_t stream);
  int64_t num_bytes() const;

 private:
  std::vector<std::unique_ptr<DeviceBuffer>> buffers_;  // the last one is in use
};

// Divides one piece of memory, of host or device, into arrays that are 256-byte aligned; without
// memory it only counts.
class Divider {
 public:
  explicit Divider(void* memory) : memory_(static_cast<char*>(memory)) {}
  template <class T>
  T* take(int64_t count) {
    char* start = memory_ ? memory_ + num_bytes_ : nullptr;
    num_bytes_ += (count * static_cast<int64_t>(sizeof(T)) + 255) / 256 * 256;
    return reinterpret_cast<T*>(start);
  }
  template <class T>
  void place(T*& array, int64_t count) {
    array = take<T>(count);
  }
  int64_t num_bytes() const { return num_bytes_; }

 private:
  char* memory_;
  int64_t num_bytes_ = 0;
};

// Page-locked host memory for uploads of one stream, a ring: the caller's memory is free at once,
// and the host waits only where it is a whole ring ahead.
class Staging {
 public:
  Staging();
  ~Staging();
  Staging(const Staging&) = delete;
  Staging& operator=(const Staging&) = delete;
  // InternalError while the stream captures: a graph would read the ring at every replay.
  void upload(void* dst, const void* src, int64_t num_bytes, cudaStream_t stream);

 private:
  static constexpr int64_t kSlotBytes = int64_t{1} << 20;
  static constexpr int kSlots = 4;
  struct Slot {
    char* memory = nullptr;
    cudaEvent_t free = nullptr;  // recorded after the last copy that read it
  };
  void next_slot(cudaStream_t stream);

  Slot slots_[kSlots];
  int slot_ = 0;
  int64_t used_ = 0;  // bytes of the slot
};

}  // namespace medusa::cuda
