// Kernels with one planted bug each, and what would be the right result: shows that the emulated
// tests can fail. Without arguments every bug runs in a process of its own; some need a sanitizer
// to be found, so the test expects in each build what that build can see. `emulator_bugs NAME`
// runs one and shows what is reported.
// SPDX-License-Identifier: Apache-2.0
#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "backend/cuda/gpu.h"

namespace medusa::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kOutputs = 2 * kThreads;

__device__ float warp_sum(float value) {
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(~0u, value, step);
  return value;
}

// x [128]; y [256], zero at first. Those called sound have no bug.

__global__ void sound_reverse(const float* x, float* y, int) {
  __shared__ float buffer[kThreads];
  buffer[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = buffer[kThreads - 1 - threadIdx.x];
}

__global__ void sound_async(const float* x, float* y, int) {
  MEDUSA_DYNAMIC_SHARED(float, buffer);
  grid_dependency_wait();
  const int t = static_cast<int>(threadIdx.x);
  if (t < 32) cp_async16(buffer + 4 * t, x + 4 * t);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  y[t] = buffer[kThreads - 1 - t];
}

// No barrier between the store and the loads.
__global__ void missing_barrier(const float* x, float* y, int) {
  __shared__ float buffer[kThreads];
  buffer[threadIdx.x] = x[threadIdx.x];
  y[threadIdx.x] = buffer[kThreads - 1 - threadIdx.x];
}

// The second round stores while others still read the first.
__global__ void barrier_missing_in_loop(const float* x, float* y, int) {
  __shared__ float sums[kThreads / 32];
  const int t = static_cast<int>(threadIdx.x);
  float total = 0.0f;
  for (int round = 0; round < 2; ++round) {
    const float sum = warp_sum(x[t] * static_cast<float>(round + 1));
    if (t % 32 == 0) sums[t / 32] = sum;
    __syncthreads();
    total += sums[0] + sums[1] + sums[2] + sums[3];
  }
  y[t] = total;
}

// Lanes talk through shared memory without __syncwarp().
__global__ void missing_syncwarp(const float* x, float* y, int) {
  __shared__ float buffer[kThreads];
  const int t = static_cast<int>(threadIdx.x);
  buffer[t] = x[t];
  y[t] = buffer[t ^ 1];
}

__global__ void global_out_of_bounds(const float*, float* y, int) {
  y[threadIdx.x + kOutputs - kThreads + 1] = 1.0f;
}

__global__ void dynamic_shared_out_of_bounds(const float* x, float* y, int) {
  MEDUSA_DYNAMIC_SHARED(float, buffer);
  buffer[threadIdx.x + 1] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = threadIdx.x == 0 ? 0.0f : buffer[threadIdx.x];
}

__global__ void static_shared_out_of_bounds(const float* x, float* y, int) {
  __shared__ float buffer[kThreads];
  buffer[threadIdx.x + 1] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = threadIdx.x == 0 ? 0.0f : buffer[threadIdx.x];
}

__global__ void static_shared_not_written(const float* x, float* y, int) {
  __shared__ float buffer[kThreads + 1];
  buffer[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = buffer[threadIdx.x + 1];
}

__global__ void dynamic_shared_not_written(const float* x, float* y, int) {
  MEDUSA_DYNAMIC_SHARED(float, buffer);
  if (threadIdx.x > 0) buffer[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = buffer[threadIdx.x];
}

__global__ void barrier_after_return(const float* x, float* y, int n) {
  const int t = static_cast<int>(threadIdx.x);
  if (t >= n - 28) return;
  y[t] = x[t];
  __syncthreads();
}

__global__ void two_barriers(const float* x, float* y, int n) {
  const int t = static_cast<int>(threadIdx.x);
  if (t < n / 2) {
    y[t] = x[t];
    __syncthreads();
  } else {
    __syncthreads();
    y[t] = x[t];
  }
}

__global__ void barrier_of_some(const float* x, float* y, int n) {
  const int t = static_cast<int>(threadIdx.x);
  if (t < n / 2) __syncthreads();
  y[t] = warp_sum(x[t]);
  if (t >= n / 2) __syncwarp();
}

__global__ void shuffle_after_return(const float* x, float* y, int n) {
  const int t = static_cast<int>(threadIdx.x);
  if (t >= n - 28) return;
  y[t] = warp_sum(x[t]);
}

__global__ void shuffle_of_some(const float* x, float* y, int) {
  const int t = static_cast<int>(threadIdx.x);
  float value = x[t];
  if (t & 1) value = __shfl_xor_sync(~0u, value, 1);
  y[t] = value;
}

__global__ void shuffle_outside_mask(const float* x, float* y, int) {
  const int t = static_cast<int>(threadIdx.x);
  y[t] = x[t];
  if (t % 32 < 16) y[t] = __shfl_sync(0xffffu, x[t], 16);
}

__global__ void async_read_before_wait(const float* x, float* y, int) {
  MEDUSA_DYNAMIC_SHARED(float, buffer);
  const int t = static_cast<int>(threadIdx.x);
  if (t < 32) cp_async16(buffer + 4 * t, x + 4 * t);
  cp_async_commit();
  __syncthreads();
  y[t] = buffer[t];
  cp_async_wait<0>();
}

__global__ void async_without_barrier(const float* x, float* y, int) {
  MEDUSA_DYNAMIC_SHARED(float, buffer);
  const int t = static_cast<int>(threadIdx.x);
  if (t < 32) cp_async16(buffer + 4 * t, x + 4 * t);
  cp_async_commit();
  cp_async_wait<0>();
  y[t] = buffer[t];
}

__global__ void async_waits_for_too_few(const float* x, float* y, int) {
  MEDUSA_DYNAMIC_SHARED(float, buffer);
  const int t = static_cast<int>(threadIdx.x);
  if (t < 32) cp_async16(buffer + 4 * t, x + 4 * t);
  cp_async_commit();
  cp_async_wait<1>();
  __syncthreads();
  y[t] = buffer[t];
  cp_async_wait<0>();
}

__global__ void async_never_waited_for(const float* x, float* y, int) {
  MEDUSA_DYNAMIC_SHARED(float, buffer);
  const int t = static_cast<int>(threadIdx.x);
  if (t < 32) cp_async16(buffer + 4 * t, x + 4 * t);
  y[t] = x[t];
}

__global__ void misaligned_copy(const float* x, float* y, int) {
  MEDUSA_DYNAMIC_SHARED(float, buffer);
  const int t = static_cast<int>(threadIdx.x);
  if (t < 31) cp_async16(buffer + 4 * t, x + 4 * t + 1);
  cp_async_commit();
  cp_async_wait<0>();
  y[t] = x[t];
}

__global__ void misaligned_load(const float* x, float* y, int) {
  const int t = static_cast<int>(threadIdx.x);
  float4 value = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  if (t < 31) value = *reinterpret_cast<const float4*>(x + 4 * t + 1);
  y[t] = t < 31 ? value.x : 0.0f;
}

__global__ void dependency_not_waited_for(const float* x, float* y, int) {
  const int t = static_cast<int>(threadIdx.x);
  if (t % 32 == 0) grid_dependency_wait();
  y[t] = x[t];
}

// Two blocks, no atomic operation.
__global__ void race_of_blocks(const float* x, float* y, int) {
  if (threadIdx.x == 0) y[0] = y[0] + x[blockIdx.x];
}

// Block 1 reads what block 0 writes.
__global__ void order_of_blocks(const float* x, float* y, int) {
  const int t = static_cast<int>(threadIdx.x);
  y[blockIdx.x * kThreads + t] = blockIdx.x ? y[t] + 1.0f : x[t];
}

// The last block adds up what all have written.
__global__ void sound_ticket(const float* x, float* y, int) {
  if (threadIdx.x > 0) return;
  y[1 + blockIdx.x] = x[blockIdx.x];
  if (take_ticket(reinterpret_cast<uint32_t*>(y + kOutputs - 1)) == 1) y[0] = y[1] + y[2];
}

// The number is taken before the work is done.
__global__ void ticket_too_early(const float* x, float* y, int) {
  if (threadIdx.x > 0) return;
  const uint32_t ticket = take_ticket(reinterpret_cast<uint32_t*>(y + kOutputs - 1));
  y[1 + blockIdx.x] = x[blockIdx.x];
  if (ticket == 1) y[0] = y[1] + y[2];
}

// Not a bug of the kernel but of who launches it; see run_case().
__global__ void copies(const float* x, float* y, int) { y[threadIdx.x] = x[threadIdx.x]; }

struct Case {
  const char* name;
  void (*kernel)(const float*, float*, int);
  std::function<float(int)> expected;  // y[i], where x[i] = i + 1
  int checked = kThreads;              // outputs
  int num_blocks = 1;
  bool overlapped = false;
  bool concurrent = false;  // Options::concurrent_blocks
  bool host_input = false;  // x is host memory
};

float x_of(int i) { return static_cast<float>(i + 1); }
float reversed(int i) { return x_of(kThreads - 1 - i); }
float before(int i) { return i == 0 ? 0.0f : x_of(i - 1); }

// What finds a bug: nothing, any build, a sanitizer, or the thread-local __shared__ variables of
// builds that have neither address nor thread sanitizer.
enum Finder { kNone, kAny, kAddress, kThread, kUndefined, kPoison };

struct Bug {
  Finder finder;
  Case test;
};

const std::vector<Bug>& bugs() {
  static const std::vector<Bug> all = {
      {kNone, {"sound_reverse", sound_reverse, reversed}},
      {kNone, {"sound_async", sound_async, reversed, kThreads, 1, true}},
      {kAny, {"missing_barrier", missing_barrier, reversed}},
      {kAny,
       {"barrier_missing_in_loop", barrier_missing_in_loop,
        [](int) { return 3.0f * kThreads * (kThreads + 1) / 2; }}},
      {kAny, {"missing_syncwarp", missing_syncwarp, [](int i) { return x_of(i ^ 1); }}},
      {kAny, {"global_out_of_bounds", global_out_of_bounds, [](int) { return 0.0f; }}},
      {kAddress, {"dynamic_shared_out_of_bounds", dynamic_shared_out_of_bounds, before}},
      {kAddress, {"static_shared_out_of_bounds", static_shared_out_of_bounds, before}},
      {kPoison,
       {"static_shared_not_written", static_shared_not_written,
        [](int i) { return i + 1 < kThreads ? x_of(i + 1) : 0.0f; }}},
      {kAny, {"dynamic_shared_not_written", dynamic_shared_not_written, x_of}},
      {kAny, {"barrier_after_return", barrier_after_return, x_of, kThreads - 28}},
      {kAny, {"two_barriers", two_barriers, x_of}},
      {kAny, {"barrier_of_some", barrier_of_some, x_of}},
      {kAny, {"shuffle_after_return", shuffle_after_return, x_of, 0}},
      {kAny, {"shuffle_of_some", shuffle_of_some, x_of, 0}},
      {kAny,
       {"shuffle_outside_mask", shuffle_outside_mask,
        [](int i) { return i % 32 < 16 ? x_of(i / 32 * 32 + 16) : x_of(i); }}},
      {kAny, {"async_read_before_wait", async_read_before_wait, x_of}},
      {kAny, {"async_without_barrier", async_without_barrier, x_of}},
      {kAny, {"async_waits_for_too_few", async_waits_for_too_few, x_of}},
      {kAny, {"async_never_waited_for", async_never_waited_for, x_of}},
      {kAny, {"misaligned_copy", misaligned_copy, x_of}},
      {kUndefined,
       {"misaligned_load", misaligned_load, [](int i) { return i < 31 ? x_of(4 * i + 1) : 0.0f; }}},
      {kAny, {"dependency_not_waited_for", dependency_not_waited_for, x_of, kThreads, 1, true}},
      {kThread, {"race_of_blocks", race_of_blocks, [](int) { return 3.0f; }, 1, 2, false, true}},
      {kAny,
       {"order_of_blocks", order_of_blocks,
        [](int i) { return i < kThreads ? x_of(i) : x_of(i - kThreads) + 1.0f; }, kOutputs, 2}},
      {kNone, {"sound_ticket", sound_ticket, [](int) { return 3.0f; }, 1, 2, false, true}},
      {kThread,
       {"ticket_too_early", ticket_too_early, [](int) { return 3.0f; }, 1, 2, false, true}},
      {kNone, {"device_memory", copies, x_of}},
      {kAny, {"host_memory", copies, x_of, kThreads, 1, false, false, true}},
  };
  return all;
}

bool present(Finder finder) {
#if defined(__SANITIZE_ADDRESS__)
  return finder == kAny || finder == kAddress;
#elif defined(__SANITIZE_THREAD__)
  return finder == kAny || finder == kThread;
#elif defined(MEDUSA_SANITIZE_UNDEFINED)
  return finder == kAny || finder == kPoison || finder == kUndefined;
#else
  return finder == kAny || finder == kPoison;
#endif
}

// Whether the kernel gives the right result under every schedule; throws where it is caught.
bool run_case(const Case& test) {
  bool right = true;
  for (int order = 0; order < 4; ++order) {
    emu::options.thread_order = emu::options.block_order = static_cast<emu::Order>(order);
    emu::options.concurrent_blocks = test.concurrent;
    const Stream stream(0);
    DeviceBuffer x(kThreads * sizeof(float)), y(kOutputs * sizeof(float));
    float values[kOutputs];
    for (int i = 0; i < kThreads; ++i) values[i] = x_of(i);
    CUDA_CHECK(cudaMemcpy(x.data(), values, sizeof(float) * kThreads, cudaMemcpyHostToDevice));
    (test.overlapped
         ? launch_overlapped<const float*, float*, int>
         : launch<const float*, float*, int>)(test.kernel, test.num_blocks, kThreads,
                                              kThreads * sizeof(float), stream.get(),
                                              test.host_input ? values
                                                              : static_cast<const float*>(x.data()),
                                              static_cast<float*>(y.data()), kThreads);
    stream.synchronize();
    CUDA_CHECK(cudaMemcpy(values, y.data(), sizeof(values), cudaMemcpyDeviceToHost));
    for (int i = 0; i < test.checked; ++i) right &= values[i] == test.expected(i);
  }
  return right;
}

// 0: nothing found.
int run_one(const std::string& name) {
  for (const Bug& bug : bugs()) {
    if (name != bug.test.name) continue;
    try {
      if (run_case(bug.test)) return 0;
      std::puts("wrong result");
    } catch (const CudaError& error) {
      std::puts(error.what());
    }
    std::fflush(stdout);
    return 1;
  }
  std::fprintf(stderr, "no bug is called %s\n", name.c_str());
  return 0;
}

bool found_in_own_process(const char* program, const char* name) {
  const pid_t child = fork();
  if (child == 0) {
    const int quiet = open("/dev/null", O_WRONLY);
    dup2(quiet, 1);
    dup2(quiet, 2);
    execl(program, program, name, nullptr);
    _exit(0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return status != 0;
}

int run_all(const char* program) {
  int num_wrong = 0;
  for (const Bug& bug : bugs()) {
    const bool found = found_in_own_process(program, bug.test.name);
    // A build may find more than it must, but never fault a sound kernel.
    const bool wrong = found ? bug.finder == kNone : present(bug.finder);
    std::printf("%-30s %s%s\n", bug.test.name, found ? "found" : "nothing found",
                wrong ? "  WRONG" : "");
    num_wrong += wrong ? 1 : 0;
  }
  return num_wrong == 0 ? 0 : 1;
}

}  // namespace
}  // namespace medusa::cuda

int main(int argc, char** argv) {
  return argc > 1 ? medusa::cuda::run_one(argv[1]) : medusa::cuda::run_all(argv[0]);
}
