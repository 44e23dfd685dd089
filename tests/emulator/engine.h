// Runs kernels on the host, one fiber per CUDA thread, blocks one after another, and looks for
// what a GPU would not report: barriers that some threads miss, lanes that meet in different warp
// operations, shared memory read before it was written, asynchronous copies read before the wait.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

namespace emu {

// Which of the threads that may run goes on, and the order of the blocks. kUnfair: random
// priorities by which one warp runs as far ahead of the others as it can.
enum class Order { kForward, kReverse, kRandom, kUnfair };

struct Options {
  Order thread_order = Order::kForward;
  Order block_order = Order::kForward;
  uint64_t seed = 1;
  // Copies and kernels wait in their streams until a call that synchronises.
  bool lazy_streams = false;
  // For the thread sanitizer: neighbouring blocks count as concurrent. Only for kernels without
  // static __shared__ variables, which all blocks share here.
  bool concurrent_blocks = false;
};
extern Options options;

// Where in a kernel.
struct Site {
  const char* file;
  int line;
};
#define EMU_SITE const char *file_ = __builtin_FILE(), int line_ = __builtin_LINE()
#define EMU_HERE \
  emu::Site { file_, line_ }

// A kernel did what it must not, or cannot be launched so.
class LaunchError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

struct LaunchConfig {
  dim3 grid, block;
  size_t smem_bytes = 0;
  bool overlapped = false;  // every thread must call grid_dependency_wait()
};

// cp.async of one thread. Nothing arrives before the wait: until then the destination is poisoned.
struct AsyncCopy {
  void* dst;
  const void* src;
  bool valid;
};
struct AsyncCopies {
  std::vector<AsyncCopy> copies;
  std::vector<size_t> group_ends;
};

// The thread that runs.
struct Current {
  uint3 thread, block;
  dim3 block_size, grid_size;
  int index, lane, warp;  // index of the thread in its block
  void* dynamic_shared;
  AsyncCopies* async;
  bool* dependency_waited;
};
extern Current current;

void check_config(const LaunchConfig& config);  // throws LaunchError
// Runs body() once per thread. Throws LaunchError; calls must exclude each other.
void run_grid(const LaunchConfig& config, const std::function<void()>& body);

// For the functions below: only from kernels.
[[noreturn]] void fail(const std::string& what, Site site);
// Number of threads of the block for which `predicate` holds.
int sync_threads(bool predicate, Site site);
void sync_warp(uint32_t mask, Site site);
// Waits for all lanes of the mask; the last one calls finish() with what each of them gave as
// `arg`.
using Finish = void (*)(uint32_t mask, void* const* args);
void warp_collective(uint32_t mask, const char* what, Site site, void* arg, Finish finish);
// Memory order for the thread sanitizer, which sees neither fences nor the atomics' order.
void fence();

// The runtime's half of a launch: runs it, queues it, or records it where the stream captures.
cudaError_t enqueue_kernel(const LaunchConfig& config, cudaStream_t stream, bool host_pointer,
                           std::function<void()> body);

// Whether the bytes hold the address of host memory. Only a guess, but a good one: an aligned word
// that is the address of a page that exists.
bool holds_host_pointer(const void* bytes, size_t num_bytes);

template <class T>
bool holds_host_pointer(T argument) {
#if __has_builtin(__builtin_clear_padding)
  __builtin_clear_padding(&argument);  // where old pointers may stand
  return holds_host_pointer(&argument, sizeof(argument));
#else
  return false;
#endif
}

template <class... Params>
cudaError_t launch(const LaunchConfig& config, cudaStream_t stream, void (*kernel)(Params...),
                   std::type_identity_t<Params>... args) {
  static_assert((std::is_trivially_copyable_v<Params> && ...), "CUDA copies arguments as bytes");
  const bool host_pointer = (holds_host_pointer(args) || ...);
  return enqueue_kernel(config, stream, host_pointer, [=] { kernel(args...); });
}

}  // namespace emu
