// SPDX-License-Identifier: Apache-2.0
#include "backend/cuda/runtime.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <utility>

namespace medusa::cuda {
namespace {

constexpr int kMinCapability = 8;  // bf16 products and cp.async

bool capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  CUDA_CHECK(cudaStreamIsCapturing(stream, &status));
  return status != cudaStreamCaptureStatusNone;
}

}  // namespace

void check(cudaError_t status, const char* expression, const char* file, int line) {
  if (status == cudaSuccess) return;
  const std::string text = cudaGetErrorString(status);
  static_cast<void>(cudaGetLastError());  // else a later call would report it once more
  const char* slash = std::strrchr(file, '/');
  throw CudaError(concat(cudaGetErrorName(status), ": ", text, "; ", expression, " at ",
                         slash == nullptr ? file : slash + 1, ":", line));
}

bool enabled(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr || std::strcmp(value, "0") != 0;
}

std::string why_unusable(int device) {
  int driver = 0;
  if (cudaDriverGetVersion(&driver) == cudaSuccess && driver == 0) return "no NVIDIA driver";
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess || count == 0) {
    static_cast<void>(cudaGetLastError());
    return concat("no CUDA device: ",
                  cudaGetErrorString(status == cudaSuccess ? cudaErrorNoDevice : status));
  }
  if (device < 0 || device >= count) {
    return concat("no such CUDA device; there ", count == 1 ? "is " : "are ", count,
                  ", counted from 0");
  }
  int major = 0, minor = 0;
  CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  if (major < kMinCapability) {
    return concat("the device has compute capability ", major, ".", minor, "; wanted ",
                  kMinCapability, ".0 or more");
  }
  return "";
}

#ifndef MEDUSA_CUDA_EMULATED
bool may_overlap(const void* kernel) {
  constexpr int kFirstArchitecture = 90;
  if (!enabled("MEDUSA_CUDA_OVERLAP")) return false;
  // Never destroyed: at exit another thread may still be in a step.
  static auto& mutex = *new std::mutex;
  static auto& known = *new std::map<std::pair<int, const void*>, bool>;
  int device = 0;
  CUDA_CHECK(cudaGetDevice(&device));
  const std::lock_guard<std::mutex> lock(mutex);
  const auto [entry, is_new] = known.try_emplace({device, kernel}, false);
  if (is_new) {
    cudaFuncAttributes attributes;
    CUDA_CHECK(cudaFuncGetAttributes(&attributes, kernel));
    entry->second = attributes.ptxVersion >= kFirstArchitecture;
    // A multiprocessor changes its share of shared memory only when it is empty: one share for all
    // kernels, or none could start beside another.
    CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                    cudaSharedmemCarveoutMaxShared));
  }
  return entry->second;
}
#endif

Stream::Stream(int device) : device_(device) {
  CUDA_CHECK(cudaSetDevice(device_));
  CUDA_CHECK(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
}

Stream::~Stream() {
  drain();
  static_cast<void>(cudaStreamDestroy(stream_));
}

void Stream::drain() const noexcept {
  if (cudaSetDevice(device_) == cudaSuccess) static_cast<void>(cudaStreamSynchronize(stream_));
}

cudaStream_t Stream::get() const {
  CUDA_CHECK(cudaSetDevice(device_));
  return stream_;
}

void Stream::synchronize() const { CUDA_CHECK(cudaStreamSynchronize(get())); }

DeviceBuffer::DeviceBuffer(int64_t num_bytes) {
  const auto size = static_cast<size_t>(std::max<int64_t>(num_bytes, 1));
  const cudaError_t status = cudaMalloc(&data_, size);
  if (status == cudaErrorMemoryAllocation) {
    static_cast<void>(cudaGetLastError());
    size_t free = 0, total = 0;
    CUDA_CHECK(cudaMemGetInfo(&free, &total));
    throw OutOfMemory(
        concat(num_bytes, " bytes asked, ", free, " bytes free of the device's ", total));
  }
  CUDA_CHECK(status);
  num_bytes_ = num_bytes;
  // Whoever uses the memory does so on a stream of its own, which does not wait for this one.
  cudaError_t cleared = cudaMemsetAsync(data_, 0, size, cudaStreamPerThread);
  if (cleared == cudaSuccess) cleared = cudaStreamSynchronize(cudaStreamPerThread);
  if (cleared != cudaSuccess) static_cast<void>(cudaFree(data_));
  CUDA_CHECK(cleared);
}

DeviceBuffer::~DeviceBuffer() { static_cast<void>(cudaFree(data_)); }

void* Scratch::at_least(int64_t num_bytes, cudaStream_t stream) {
  const int64_t have = buffers_.empty() ? 0 : buffers_.back()->num_bytes();
  if (num_bytes > have || buffers_.empty()) {
    MEDUSA_CHECK_INTERNAL(!capturing(stream), "scratch memory of ", have, " bytes would grow to ",
                          num_bytes, " while a graph is captured");
    // By halves at least, so that all that were outgrown are not much more than the last.
    buffers_.push_back(std::make_unique<DeviceBuffer>(std::max(num_bytes, have + have / 2)));
  }
  return buffers_.back()->data();
}

int64_t Scratch::num_bytes() const {
  int64_t sum = 0;
  for (const auto& buffer : buffers_) sum += buffer->num_bytes();
  return sum;
}

Staging::Staging() {
  for (Slot& slot : slots_) {
    void* memory = nullptr;
    CUDA_CHECK(cudaHostAlloc(&memory, kSlotBytes, cudaHostAllocDefault));
    slot.memory = static_cast<char*>(memory);
    CUDA_CHECK(cudaEventCreateWithFlags(&slot.free, cudaEventDisableTiming));
  }
}

Staging::~Staging() {
  for (const Slot& slot : slots_) {
    static_cast<void>(cudaEventDestroy(slot.free));
    static_cast<void>(cudaFreeHost(slot.memory));
  }
}

void Staging::next_slot(cudaStream_t stream) {
  CUDA_CHECK(cudaEventRecord(slots_[slot_].free, stream));
  slot_ = (slot_ + 1) % kSlots;
  used_ = 0;
  CUDA_CHECK(cudaEventSynchronize(slots_[slot_].free));
}

void Staging::upload(void* dst, const void* src, int64_t num_bytes, cudaStream_t stream) {
  MEDUSA_CHECK_INTERNAL(!capturing(stream), "upload of ", num_bytes,
                        " bytes while a graph is captured");
  constexpr int64_t kAlignment = 256;
  for (int64_t done = 0; done < num_bytes;) {
    if (used_ >= kSlotBytes) next_slot(stream);
    const int64_t count = std::min(num_bytes - done, kSlotBytes - used_);
    char* staged = slots_[slot_].memory + used_;
    std::memcpy(staged, static_cast<const char*>(src) + done, static_cast<size_t>(count));
    CUDA_CHECK(cudaMemcpyAsync(static_cast<char*>(dst) + done, staged, static_cast<size_t>(count),
                               cudaMemcpyHostToDevice, stream));
    used_ += (count + kAlignment - 1) / kAlignment * kAlignment;
    done += count;
  }
}

}  // namespace medusa::cuda
