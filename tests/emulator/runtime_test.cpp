// backend/cuda/runtime.h over the emulated runtime, with streams that run as late as they may, and
// what that runtime refuses.
// SPDX-License-Identifier: Apache-2.0
#include "backend/cuda/runtime.h"

#include <cstring>
#include <numeric>
#include <thread>
#include <vector>

#include "cpp/check.h"
#include "emulator/engine.h"

namespace medusa::cuda {
namespace {

std::vector<uint8_t> download(const Buffer& buffer, const Stream& stream) {
  std::vector<uint8_t> bytes(static_cast<size_t>(buffer.num_bytes()));
  CUDA_CHECK(cudaMemcpyAsync(bytes.data(), buffer.data(), bytes.size(), cudaMemcpyDeviceToHost,
                             stream.get()));
  stream.synchronize();
  return bytes;
}

cudaGraph_t end_capture(const Stream& stream) {
  cudaGraph_t graph = nullptr;
  static_cast<void>(cudaStreamEndCapture(stream.get(), &graph));
  static_cast<void>(cudaGetLastError());
  return graph;
}

TEST(fresh_memory_is_zero) {
  const Stream stream(0);
  for (const uint8_t byte : download(DeviceBuffer(1000), stream)) CHECK(byte == 0);
}

TEST(too_much_memory_is_said) {
  CHECK_THROWS(OutOfMemory, "bytes free", DeviceBuffer(int64_t{1} << 50));
  CHECK(DeviceBuffer(1).data() != nullptr);
}

TEST(uploads_of_every_size_leave_the_source_free) {
  emu::options.lazy_streams = true;
  const Stream stream(0);
  Staging staging;
  for (const size_t total : {size_t{1}, size_t{300}, size_t{1} << 20, size_t{9} << 20}) {
    for (const size_t piece : {size_t{37}, size_t{5000}, size_t{3} << 20}) {
      if (total / piece > 2000) continue;
      const DeviceBuffer buffer(static_cast<int64_t>(total));
      std::vector<uint8_t> want(total);
      for (size_t i = 0; i < total; ++i) want[i] = static_cast<uint8_t>(i * 7 + i / 251);
      for (size_t first = 0; first < total; first += piece) {
        std::vector<uint8_t> source(
            want.begin() + static_cast<ptrdiff_t>(first),
            want.begin() + static_cast<ptrdiff_t>(std::min(first + piece, total)));
        staging.upload(static_cast<uint8_t*>(buffer.data()) + first, source.data(),
                       static_cast<int64_t>(source.size()), stream.get());
        std::memset(source.data(), 0xEE, source.size());
      }
      CHECK(download(buffer, stream) == want);
    }
  }
  emu::options.lazy_streams = false;
}

// The emulator must show what Staging is there to prevent.
TEST(a_reused_pinned_source_is_seen) {
  emu::options.lazy_streams = true;
  const Stream stream(0);
  const DeviceBuffer buffer(100);
  void* pinned = nullptr;
  CUDA_CHECK(cudaHostAlloc(&pinned, 100, cudaHostAllocDefault));
  std::memset(pinned, 1, 100);
  CUDA_CHECK(cudaMemcpyAsync(buffer.data(), pinned, 100, cudaMemcpyHostToDevice, stream.get()));
  std::memset(pinned, 2, 100);
  CHECK(download(buffer, stream)[0] == 2);
  CUDA_CHECK(cudaFreeHost(pinned));
  emu::options.lazy_streams = false;
}

TEST(scratch_grows_outside_captures_only) {
  const Stream stream(0);
  Scratch scratch;
  void* small = scratch.at_least(1000, stream.get());
  CHECK(scratch.at_least(500, stream.get()) == small);
  void* large = scratch.at_least(100000, stream.get());
  CHECK(large != small);
  CUDA_CHECK(cudaStreamBeginCapture(stream.get(), cudaStreamCaptureModeThreadLocal));
  CHECK(scratch.at_least(100000, stream.get()) == large);
  CHECK_THROWS(InternalError, "while a graph is captured",
               static_cast<void>(scratch.at_least(1 << 20, stream.get())));
  cudaGraph_t graph = end_capture(stream);
  CHECK(graph != nullptr);
  CUDA_CHECK(cudaGraphDestroy(graph));
  CHECK(scratch.num_bytes() == 101000);
}

TEST(uploads_are_not_captured) {
  const Stream stream(0);
  Staging staging;
  const DeviceBuffer buffer(8);
  const double value = 1.0;
  CUDA_CHECK(cudaStreamBeginCapture(stream.get(), cudaStreamCaptureModeThreadLocal));
  CHECK_THROWS(InternalError, "while a graph is captured",
               staging.upload(buffer.data(), &value, 8, stream.get()));
  CUDA_CHECK(cudaGraphDestroy(end_capture(stream)));
}

TEST(allocation_and_waiting_spoil_a_capture) {
  const Stream stream(0);
  for (const bool allocate : {true, false}) {
    CUDA_CHECK(cudaStreamBeginCapture(stream.get(), cudaStreamCaptureModeThreadLocal));
    if (allocate) {
      CHECK_THROWS(CudaError, "cudaErrorStreamCaptureUnsupported", DeviceBuffer(8));
    } else {
      CHECK_THROWS(CudaError, "cudaErrorStreamCaptureUnsupported", stream.synchronize());
    }
    CHECK(end_capture(stream) == nullptr);
  }
  // Another thread's capture of its own forbids nothing here.
  CUDA_CHECK(cudaStreamBeginCapture(stream.get(), cudaStreamCaptureModeThreadLocal));
  std::thread([] { CHECK(DeviceBuffer(8).data() != nullptr); }).join();
  cudaGraph_t graph = end_capture(stream);
  CHECK(graph != nullptr);
  CUDA_CHECK(cudaGraphDestroy(graph));
}

TEST(copies_past_the_end_are_refused) {
  const Stream stream(0);
  const DeviceBuffer buffer(100);
  char host[200] = {};
  CHECK_THROWS(
      CudaError, "past its end",
      CUDA_CHECK(cudaMemcpyAsync(buffer.data(), host, 101, cudaMemcpyHostToDevice, stream.get())));
  CHECK_THROWS(
      CudaError, "not device memory",
      CUDA_CHECK(cudaMemcpyAsync(host + 100, host, 10, cudaMemcpyHostToDevice, stream.get())));
}

TEST(devices_that_are_not_there) {
  CHECK(why_unusable(0).empty());
  CHECK(why_unusable(1).find("there is 1, counted from 0") != std::string::npos);
}

}  // namespace
}  // namespace medusa::cuda
