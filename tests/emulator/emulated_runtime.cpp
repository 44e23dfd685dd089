// The part of the CUDA runtime that this project calls, on host memory. One lock around every
// call, so several threads may drive several backends; kernels run one at a time.
//
// As strict as the real one where that is documented: no allocation, release or synchronisation
// while a stream captures (which also spoils the capture), graphs keep their arguments, copies
// from page-locked memory read it late (Options::lazy_streams). A failed kernel is not sticky.
// SPDX-License-Identifier: Apache-2.0
#include <cuda_runtime_api.h>
#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "emulator/device_memory.h"
#include "emulator/engine.h"

namespace {

using Work = std::function<void()>;

constexpr size_t kDeviceBytes = size_t{2} << 30;
constexpr int kNumMultiprocessors = 4;  // few, so that persistent grids loop

struct Capture {
  std::vector<Work> work;
  cudaStreamCaptureMode mode;
  std::thread::id thread;
  bool spoiled = false;
};

}  // namespace

struct CUstream_st {
  std::unique_ptr<Capture> capture;
  std::deque<Work> queue;
  uint64_t num_queued = 0, num_done = 0;
};

struct CUevent_st {
  CUstream_st* stream = nullptr;  // where it was last recorded
  uint64_t after = 0;             // passed when the stream has done so much
};

struct CUgraph_st {
  std::vector<Work> work;
};

struct CUgraphExec_st {
  std::vector<Work> work;
};

namespace {

// Never destroyed: the process may end while other threads still call.
struct Runtime {
  std::mutex mutex;
  std::set<CUstream_st*> streams;
  std::set<CUevent_st*> events;
  CUstream_st default_stream, per_thread_stream;
  emu::DeviceMemory memory{kDeviceBytes};
  std::map<char*, size_t> pinned_memory;
  cudaError_t last_error = cudaSuccess;
  std::string message;  // of the last error
};
Runtime& runtime = *new Runtime;

using Lock = std::lock_guard<std::mutex>;

cudaError_t failed(cudaError_t status, const std::string& message = "") {
  if (status == cudaSuccess) return status;
  runtime.message = message;
  return runtime.last_error = status;
}

// Null for a stream that was destroyed.
CUstream_st* find_stream(cudaStream_t stream) {
  if (stream == nullptr || stream == cudaStreamLegacy) return &runtime.default_stream;
  if (stream == cudaStreamPerThread) return &runtime.per_thread_stream;
  return runtime.streams.count(stream) > 0 ? stream : nullptr;
}

bool is_pinned(const void* address) {
  char* byte = static_cast<char*>(const_cast<void*>(address));
  const auto block = runtime.pinned_memory.upper_bound(byte);
  return block != runtime.pinned_memory.begin() &&
         byte < std::prev(block)->first + std::prev(block)->second;
}

cudaError_t run(const Work& work) {
  cudaError_t status = cudaSuccess;
  runtime.memory.open();
  try {
    work();
  } catch (const emu::LaunchError& error) {
    status = failed(cudaErrorLaunchFailure, error.what());
  }
  const std::string written = runtime.memory.close();
  return written.empty() ? status : failed(cudaErrorIllegalAddress, written);
}

// Runs what was queued up to the count `until`; goes on after an error, and returns the first.
cudaError_t drain(CUstream_st& stream, uint64_t until) {
  cudaError_t status = cudaSuccess;
  while (stream.num_done < until) {
    const Work work = std::move(stream.queue.front());
    stream.queue.pop_front();
    ++stream.num_done;
    const cudaError_t now = run(work);
    if (status == cudaSuccess) status = now;
  }
  return status;
}

cudaError_t drain_all() {
  cudaError_t status = drain(runtime.default_stream, runtime.default_stream.num_queued);
  const cudaError_t own = drain(runtime.per_thread_stream, runtime.per_thread_stream.num_queued);
  if (status == cudaSuccess) status = own;
  for (CUstream_st* stream : runtime.streams) {
    const cudaError_t now = drain(*stream, stream->num_queued);
    if (status == cudaSuccess) status = now;
  }
  return status;
}

cudaError_t enqueue(cudaStream_t handle, Work work) {
  CUstream_st* stream = find_stream(handle);
  if (stream == nullptr) return failed(cudaErrorInvalidResourceHandle);
  if (stream->capture != nullptr) {
    if (stream->capture->spoiled) return failed(cudaErrorStreamCaptureInvalidated);
    stream->capture->work.push_back(std::move(work));
    return cudaSuccess;
  }
  ++stream->num_queued;
  if (emu::options.lazy_streams) {
    stream->queue.push_back(std::move(work));
    return cudaSuccess;
  }
  // What the option, now off, left behind comes first.
  const cudaError_t earlier = drain(*stream, stream->num_queued - 1);
  ++stream->num_done;
  const cudaError_t now = run(work);
  return earlier == cudaSuccess ? now : earlier;
}

// For calls that could wait for the device: while a capture that forbids them is under way they
// fail and spoil it.
bool forbidden_by_capture() {
  bool forbidden = false;
  for (CUstream_st* stream : runtime.streams) {
    Capture* capture = stream->capture.get();
    if (capture == nullptr) continue;
    if (capture->mode == cudaStreamCaptureModeGlobal ||
        (capture->mode == cudaStreamCaptureModeThreadLocal &&
         capture->thread == std::this_thread::get_id())) {
      capture->spoiled = true;
      forbidden = true;
    }
  }
  return forbidden;
}

cudaError_t synchronize(CUstream_st* stream) {
  if (stream == nullptr) return failed(cudaErrorInvalidResourceHandle);
  if (stream->capture != nullptr) {
    stream->capture->spoiled = true;
    return failed(cudaErrorStreamCaptureUnsupported);
  }
  return drain(*stream, stream->num_queued);
}

// Each call does one piece of the queued work, so that a host that polls comes to an end.
cudaError_t query(CUstream_st& stream, uint64_t until) {
  if (stream.num_done >= until) return cudaSuccess;
  const cudaError_t status = drain(stream, stream.num_done + 1);
  if (status != cudaSuccess) return status;
  return stream.num_done >= until ? cudaSuccess : cudaErrorNotReady;
}

cudaError_t check_copy(void* dst, const void* src, size_t num_bytes, cudaMemcpyKind kind) {
  const bool to_device = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
  const bool from_device = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
  if (to_device && !runtime.memory.holds(dst, num_bytes)) {
    return failed(cudaErrorInvalidValue, "copy to what is not device memory, or past its end");
  }
  if (from_device && !runtime.memory.holds(src, num_bytes)) {
    return failed(cudaErrorInvalidValue, "copy from what is not device memory, or past its end");
  }
  return cudaSuccess;
}

}  // namespace

bool emu::holds_host_pointer(const void* bytes, size_t num_bytes) {
  const Lock lock(runtime.mutex);
  for (size_t at = 0; at + sizeof(uintptr_t) <= num_bytes; at += sizeof(uintptr_t)) {
    uintptr_t word;
    std::memcpy(&word, static_cast<const char*>(bytes) + at, sizeof(word));
    // Where programs, heaps and mappings lie; two small numbers side by side are no address.
    const uintptr_t high = word >> 40;
    const auto low = static_cast<int32_t>(word);
    if (!(high == 0x55 || high == 0x56 || (high >= 0x7e && high <= 0x7f))) continue;
    if (low > -(1 << 24) && low < 1 << 24) continue;
    const auto* address = reinterpret_cast<const void*>(word);
    if (runtime.memory.contains(address) || is_pinned(address)) continue;
    void* page = reinterpret_cast<void*>(word & ~uintptr_t{4095});
    if (msync(page, 1, MS_ASYNC) == 0) return true;  // ENOMEM where there is no such page
  }
  return false;
}

cudaError_t emu::enqueue_kernel(const LaunchConfig& config, cudaStream_t stream, bool host_pointer,
                                std::function<void()> body) {
  const Lock lock(runtime.mutex);
  if (host_pointer) {
    return failed(cudaErrorIllegalAddress, "an argument of the kernel points to host memory");
  }
  try {
    check_config(config);
  } catch (const LaunchError& error) {
    return failed(cudaErrorInvalidConfiguration, error.what());
  }
  return enqueue(stream, [config, body = std::move(body)] { run_grid(config, body); });
}

// For tests, by way of ctypes: see tests/emulation_util.py.
extern "C" __attribute__((visibility("default"))) void medusa_emulation_options(int thread_order,
                                                                                int block_order,
                                                                                uint64_t seed,
                                                                                bool lazy_streams) {
  const Lock lock(runtime.mutex);
  emu::options.thread_order = static_cast<emu::Order>(thread_order);
  emu::options.block_order = static_cast<emu::Order>(block_order);
  emu::options.seed = seed;
  emu::options.lazy_streams = lazy_streams;
}

extern "C" {

// ---- devices and errors

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  const Lock lock(runtime.mutex);
  return device == 0 ? cudaSuccess : failed(cudaErrorInvalidDevice);
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  std::memset(properties, 0, sizeof(*properties));
  std::strcpy(properties->name, "CUDA emulator");
  properties->major = 9;
  properties->multiProcessorCount = kNumMultiprocessors;
  properties->totalGlobalMem = kDeviceBytes;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
      *value = 9;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      *value = kNumMultiprocessors;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = 227 << 10;
      return cudaSuccess;
    default:
      return failed(cudaErrorInvalidValue, "the emulator does not know this device attribute");
  }
}

cudaError_t cudaGetLastError() {
  const Lock lock(runtime.mutex);
  return std::exchange(runtime.last_error, cudaSuccess);
}

cudaError_t cudaPeekAtLastError() {
  const Lock lock(runtime.mutex);
  return runtime.last_error;
}

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation:
      return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidConfiguration:
      return "cudaErrorInvalidConfiguration";
    case cudaErrorInvalidDevice:
      return "cudaErrorInvalidDevice";
    case cudaErrorInvalidResourceHandle:
      return "cudaErrorInvalidResourceHandle";
    case cudaErrorNotReady:
      return "cudaErrorNotReady";
    case cudaErrorIllegalAddress:
      return "cudaErrorIllegalAddress";
    case cudaErrorLaunchFailure:
      return "cudaErrorLaunchFailure";
    case cudaErrorStreamCaptureUnsupported:
      return "cudaErrorStreamCaptureUnsupported";
    case cudaErrorStreamCaptureInvalidated:
      return "cudaErrorStreamCaptureInvalidated";
    case cudaErrorIllegalState:
      return "cudaErrorIllegalState";
    default:
      return "an error that the emulator does not name";
  }
}

// What went wrong in words, where the emulator has some.
const char* cudaGetErrorString(cudaError_t error) {
  const Lock lock(runtime.mutex);
  if (runtime.message.empty() || error != runtime.last_error) return cudaGetErrorName(error);
  return runtime.message.c_str();
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }

// ---- memory

cudaError_t cudaMalloc(void** out, size_t num_bytes) {
  const Lock lock(runtime.mutex);
  if (forbidden_by_capture()) return failed(cudaErrorStreamCaptureUnsupported);
  *out = runtime.memory.allocate(num_bytes);
  return *out == nullptr ? failed(cudaErrorMemoryAllocation) : cudaSuccess;
}

cudaError_t cudaFree(void* memory) {
  const Lock lock(runtime.mutex);
  if (memory == nullptr) return cudaSuccess;
  if (forbidden_by_capture()) return failed(cudaErrorStreamCaptureUnsupported);
  const cudaError_t status = drain_all();
  return runtime.memory.release(memory) ? status : failed(cudaErrorInvalidValue);
}

cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  const Lock lock(runtime.mutex);
  *free = runtime.memory.free_bytes();
  *total = kDeviceBytes;
  return cudaSuccess;
}

cudaError_t cudaHostAlloc(void** out, size_t num_bytes, unsigned) {
  const Lock lock(runtime.mutex);
  if (forbidden_by_capture()) return failed(cudaErrorStreamCaptureUnsupported);
  if (posix_memalign(out, 4096, num_bytes) != 0) return failed(cudaErrorMemoryAllocation);
  std::memset(*out, 0xFF, num_bytes);
  runtime.pinned_memory[static_cast<char*>(*out)] = num_bytes;
  return cudaSuccess;
}

cudaError_t cudaHostGetDevicePointer(void** device, void* host, unsigned) {
  *device = host;
  return cudaSuccess;
}

cudaError_t cudaFreeHost(void* memory) {
  const Lock lock(runtime.mutex);
  if (memory == nullptr) return cudaSuccess;
  if (forbidden_by_capture()) return failed(cudaErrorStreamCaptureUnsupported);
  if (runtime.pinned_memory.erase(static_cast<char*>(memory)) == 0) {
    return failed(cudaErrorInvalidValue);
  }
  const cudaError_t status = drain_all();
  std::free(memory);
  return status;
}

cudaError_t cudaMemcpyAsync(void* dst, const void* src, size_t num_bytes, cudaMemcpyKind kind,
                            cudaStream_t handle) {
  const Lock lock(runtime.mutex);
  if (const cudaError_t status = check_copy(dst, src, num_bytes, kind)) return status;
  const CUstream_st* stream = find_stream(handle);
  const bool captures = stream != nullptr && stream->capture != nullptr;
  // Ordinary host memory is read before the call returns, and written before it returns.
  if (kind == cudaMemcpyHostToDevice && !captures && !is_pinned(src)) {
    const char* bytes = static_cast<const char*>(src);
    const std::vector<char> copy(bytes, bytes + num_bytes);
    return enqueue(handle, [=] { std::memcpy(dst, copy.data(), num_bytes); });
  }
  const cudaError_t status = enqueue(handle, [=] { std::memmove(dst, src, num_bytes); });
  if (status == cudaSuccess && kind == cudaMemcpyDeviceToHost && !captures && !is_pinned(dst)) {
    return synchronize(find_stream(handle));
  }
  return status;
}

cudaError_t cudaMemcpy(void* dst, const void* src, size_t num_bytes, cudaMemcpyKind kind) {
  const Lock lock(runtime.mutex);
  if (forbidden_by_capture()) return failed(cudaErrorStreamCaptureUnsupported);
  if (const cudaError_t status = check_copy(dst, src, num_bytes, kind)) return status;
  const cudaError_t status = drain_all();
  const cudaError_t copied = run([=] { std::memmove(dst, src, num_bytes); });
  return status == cudaSuccess ? copied : status;
}

cudaError_t cudaMemsetAsync(void* dst, int value, size_t num_bytes, cudaStream_t stream) {
  const Lock lock(runtime.mutex);
  if (!runtime.memory.holds(dst, num_bytes)) {
    return failed(cudaErrorInvalidValue, "memset of what is not device memory, or past its end");
  }
  return enqueue(stream, [=] { std::memset(dst, value, num_bytes); });
}

// ---- streams and events

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  const Lock lock(runtime.mutex);
  *stream = new CUstream_st;
  runtime.streams.insert(*stream);
  return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  const Lock lock(runtime.mutex);
  if (runtime.streams.count(stream) == 0) return failed(cudaErrorInvalidResourceHandle);
  const cudaError_t status = drain(*stream, stream->num_queued);
  for (CUevent_st* event : runtime.events) {
    if (event->stream == stream) event->stream = nullptr;
  }
  runtime.streams.erase(stream);
  delete stream;
  return status;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  const Lock lock(runtime.mutex);
  return synchronize(find_stream(stream));
}

cudaError_t cudaDeviceSynchronize() {
  const Lock lock(runtime.mutex);
  if (forbidden_by_capture()) return failed(cudaErrorStreamCaptureUnsupported);
  return drain_all();
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  const Lock lock(runtime.mutex);
  *event = new CUevent_st;
  runtime.events.insert(*event);
  return cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  const Lock lock(runtime.mutex);
  if (runtime.events.erase(event) == 0) return failed(cudaErrorInvalidResourceHandle);
  delete event;
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t handle) {
  const Lock lock(runtime.mutex);
  CUstream_st* stream = find_stream(handle);
  if (stream == nullptr) return failed(cudaErrorInvalidResourceHandle);
  if (stream->capture != nullptr) {
    return failed(cudaErrorStreamCaptureUnsupported, "the emulator captures no events");
  }
  event->stream = stream;
  event->after = stream->num_queued;
  return cudaSuccess;
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  const Lock lock(runtime.mutex);
  return event->stream == nullptr ? cudaSuccess : drain(*event->stream, event->after);
}

cudaError_t cudaStreamQuery(cudaStream_t handle) {
  const Lock lock(runtime.mutex);
  CUstream_st* stream = find_stream(handle);
  if (stream == nullptr || stream->capture != nullptr) return synchronize(stream);  // the error
  return query(*stream, stream->num_queued);
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
  const Lock lock(runtime.mutex);
  return event->stream == nullptr ? cudaSuccess : query(*event->stream, event->after);
}

// Work of one stream that waits for an event of another does the other's work first.
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  const Lock lock(runtime.mutex);
  CUstream_st* recorded = event->stream;
  const uint64_t after = event->after;
  if (recorded == nullptr) return cudaSuccess;
  return enqueue(stream, [=] {
    if (runtime.streams.count(recorded) > 0) drain(*recorded, after);
  });
}

// ---- graphs

cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode) {
  const Lock lock(runtime.mutex);
  CUstream_st* stream = find_stream(handle);
  if (stream == nullptr || runtime.streams.count(stream) == 0) {
    return failed(cudaErrorStreamCaptureUnsupported);
  }
  if (stream->capture != nullptr) return failed(cudaErrorIllegalState);
  stream->capture = std::make_unique<Capture>();
  stream->capture->mode = mode;
  stream->capture->thread = std::this_thread::get_id();
  return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* graph) {
  const Lock lock(runtime.mutex);
  *graph = nullptr;
  CUstream_st* stream = find_stream(handle);
  if (stream == nullptr) return failed(cudaErrorInvalidResourceHandle);
  const std::unique_ptr<Capture> capture = std::move(stream->capture);
  if (capture == nullptr) return failed(cudaErrorIllegalState);
  if (capture->spoiled) return failed(cudaErrorStreamCaptureInvalidated);
  *graph = new CUgraph_st{std::move(capture->work)};
  return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t handle, cudaStreamCaptureStatus* status) {
  const Lock lock(runtime.mutex);
  const CUstream_st* stream = find_stream(handle);
  if (stream == nullptr) return failed(cudaErrorInvalidResourceHandle);
  *status = stream->capture == nullptr ? cudaStreamCaptureStatusNone
            : stream->capture->spoiled ? cudaStreamCaptureStatusInvalidated
                                       : cudaStreamCaptureStatusActive;
  return cudaSuccess;
}

cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* count) {
  const Lock lock(runtime.mutex);
  if (nodes != nullptr) return failed(cudaErrorInvalidValue, "the emulator only counts nodes");
  *count = graph->work.size();
  return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long) {
  const Lock lock(runtime.mutex);
  *exec = new CUgraphExec_st{graph->work};
  return cudaSuccess;
}

cudaError_t cudaGraphUpload(cudaGraphExec_t, cudaStream_t) { return cudaSuccess; }

cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
  const Lock lock(runtime.mutex);
  for (const Work& work : exec->work) {
    if (const cudaError_t status = enqueue(stream, work)) return status;
  }
  return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  const Lock lock(runtime.mutex);
  delete graph;
  return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
  const Lock lock(runtime.mutex);
  delete exec;
  return cudaSuccess;
}
}
