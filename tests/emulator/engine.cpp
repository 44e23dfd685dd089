// Compiled without sanitizers; EMU_ASAN or EMU_TSAN say what the kernels are compiled with.
// SPDX-License-Identifier: Apache-2.0
#include "emulator/engine.h"

#include <link.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <sstream>
#include <utility>

#include "emulator/fiber.h"

#ifdef EMU_TSAN
extern "C" {
void __tsan_acquire(void* object);
void __tsan_release(void* object);
}
#endif

namespace emu {

Options options;
Current current;

namespace {

constexpr int kMaxThreads = 1024;  // of a block
constexpr int kMaxWarps = kMaxThreads / 32;
constexpr size_t kMaxSharedBytes = 227 << 10;

enum class State : uint8_t { kReady, kBlocked, kDone };

struct Thread {
  Fiber fiber;
  Current current{};
  State state = State::kDone;
  const char* waits_in = "";
  Site site{"", 0};
  AsyncCopies async;
  bool dependency_waited = false;
};

// Lanes that have arrived at one warp operation.
struct Meeting {
  uint32_t mask = 0, arrived = 0;
  const char* what = "";
  Site site{"", 0};
  void* args[32] = {};
};

struct Warp {
  uint32_t exists = 0, exited = 0;
  Meeting meetings[32];
  int num_meetings = 0;
};

struct Barrier {
  Site site{"", 0};
  int waiting[kMaxThreads];
  int num_waiting = 0;
  int count = 0, result = 0;  // of the predicate: being counted, and of the last meeting
};

struct Engine {
  // Two sets: under the thread sanitizer neighbouring blocks can count as concurrent.
  Thread sets[2][kMaxThreads];
  Thread* threads = sets[0];  // of the block that runs
  Thread* running = nullptr;
  Warp warps[kMaxWarps];
  Barrier barrier;
  int num_threads = 0, num_done = 0;
  // The threads that may run, a ring.
  int ready[kMaxThreads];
  int ready_first = 0, num_ready = 0;
  uint32_t priority[kMaxThreads];
  uint64_t random_state = 1;
  const std::function<void()>* body = nullptr;
  bool overlapped = false;
  std::string failure;
  // Objects that stand for an order of memory accesses.
  char block_start, block_end, fence;
};
Engine& engine = *new Engine;  // never destroyed: the process may end on any thread

void acquire([[maybe_unused]] void* object) {
#ifdef EMU_TSAN
  __tsan_acquire(object);
#endif
}
void release([[maybe_unused]] void* object) {
#ifdef EMU_TSAN
  __tsan_release(object);
#endif
}

uint64_t random_bits() {
  uint64_t& x = engine.random_state;
  x ^= x << 13;
  x ^= x >> 7;
  x ^= x << 17;
  return x;
}

std::string text(Site site) {
  const char* slash = std::strrchr(site.file, '/');
  return std::string(slash ? slash + 1 : site.file) + ":" + std::to_string(site.line);
}

std::string text(const Current& c) {
  std::ostringstream out;
  out << "block (" << c.block.x << "," << c.block.y << "," << c.block.z << ") thread ("
      << c.thread.x << "," << c.thread.y << "," << c.thread.z << ") warp " << c.warp << " lane "
      << c.lane;
  return out.str();
}

bool same(const char* a, const char* b) { return a == b || std::strcmp(a, b) == 0; }
bool same(Site a, Site b) { return a.line == b.line && same(a.file, b.file); }

void make_ready(int thread) {
  engine.threads[thread].state = State::kReady;
  engine.ready[(engine.ready_first + engine.num_ready++) % kMaxThreads] = thread;
}

void make_ready(const int* threads, int count) {
  if (options.thread_order == Order::kReverse) {
    for (int i = count; i-- > 0;) make_ready(threads[i]);
  } else {
    for (int i = 0; i < count; ++i) make_ready(threads[i]);
  }
}

int next_ready() {
  int& first = engine.ready[engine.ready_first];
  if (options.thread_order == Order::kRandom) {
    const uint64_t pick = random_bits() % static_cast<uint64_t>(engine.num_ready);
    std::swap(first, engine.ready[(engine.ready_first + pick) % kMaxThreads]);
  } else if (options.thread_order == Order::kUnfair) {
    int* best = &first;
    for (int i = 1; i < engine.num_ready; ++i) {
      int* other = &engine.ready[(engine.ready_first + i) % kMaxThreads];
      if (engine.priority[*other] > engine.priority[*best]) best = other;
    }
    std::swap(first, *best);
  }
  const int thread = first;
  engine.ready_first = (engine.ready_first + 1) % kMaxThreads;
  --engine.num_ready;
  return thread;
}

void leave_fiber() { engine.running->fiber.leave(); }

void wait_here(const char* what, Site site) {
  Thread& thread = *engine.running;
  thread.state = State::kBlocked;
  thread.waits_in = what;
  thread.site = site;
  leave_fiber();
}

void let_others_run() {
  make_ready(current.index);
  leave_fiber();
}

// What a fiber does: one thread of one block after another.
void run_threads() {
  for (;;) {
    acquire(&engine.block_start);
    (*engine.body)();
    Thread& thread = *engine.running;
    if (!thread.async.copies.empty()) {
      fail("thread left the kernel with cp.async copies that it never waited for", {"?", 0});
    }
    if (engine.overlapped && !thread.dependency_waited) {
      fail("thread of an overlapped kernel never called grid_dependency_wait()", {"?", 0});
    }
    release(&engine.block_end);
    thread.state = State::kDone;
    ++engine.num_done;
    engine.warps[thread.current.warp].exited |= 1u << thread.current.lane;
    leave_fiber();
  }
}

#if !defined(EMU_ASAN) && !defined(EMU_TSAN)
thread_local volatile char tls_anchor;  // makes the system allocate this thread's segment

// The zero-initialised thread-local variables of this shared object: where __shared__ variables
// live in builds without sanitizers (cuda_emulator.h).
std::pair<void*, size_t> shared_variables() {
  tls_anchor = 0;
  std::pair<void*, size_t> found{nullptr, 0};
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* out) {
        const auto here = reinterpret_cast<uintptr_t>(&run_threads);
        bool this_object = false;
        const ElfW(Phdr)* segment = nullptr;
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          const ElfW(Phdr)& header = info->dlpi_phdr[i];
          const uintptr_t start = info->dlpi_addr + header.p_vaddr;
          this_object |= header.p_type == PT_LOAD && here >= start && here - start < header.p_memsz;
          if (header.p_type == PT_TLS) segment = &header;
        }
        if (!this_object || segment == nullptr || info->dlpi_tls_data == nullptr) return 0;
        *static_cast<std::pair<void*, size_t>*>(out) = {
            static_cast<char*>(info->dlpi_tls_data) + segment->p_filesz,
            segment->p_memsz - segment->p_filesz};
        return 1;
      },
      &found);
  return found;
}
#else
std::pair<void*, size_t> shared_variables() { return {nullptr, 0}; }
#endif

std::vector<uint64_t> order_of_blocks(uint64_t count) {
  std::vector<uint64_t> order(count);
  for (uint64_t i = 0; i < count; ++i) {
    order[i] = options.block_order == Order::kReverse ? count - 1 - i : i;
  }
  if (options.block_order == Order::kRandom || options.block_order == Order::kUnfair) {
    for (uint64_t i = count; i > 1; --i) std::swap(order[i - 1], order[random_bits() % i]);
  }
  return order;
}

void start_block(const LaunchConfig& config, uint64_t block, void* dynamic_shared) {
  const dim3 grid = config.grid, size = config.block;
  engine.num_done = engine.ready_first = engine.num_ready = 0;
  engine.barrier.num_waiting = engine.barrier.count = 0;
  for (int w = 0; w * 32 < engine.num_threads; ++w) {
    const int lanes = engine.num_threads - w * 32;
    engine.warps[w].exists = lanes >= 32 ? ~0u : (1u << lanes) - 1;
    engine.warps[w].exited = 0;
    engine.warps[w].num_meetings = 0;
  }
  int all[kMaxThreads];
  for (int i = 0; i < engine.num_threads; ++i) {
    Thread& thread = engine.threads[i];
    const auto n = static_cast<unsigned>(i);
    thread.async.copies.clear();
    thread.async.group_ends.clear();
    thread.dependency_waited = false;
    thread.current = {
        {n % size.x, n / size.x % size.y, n / (size.x * size.y)},
        {static_cast<unsigned>(block % grid.x), static_cast<unsigned>(block / grid.x % grid.y),
         static_cast<unsigned>(block / (uint64_t{grid.x} * grid.y))},
        size,
        grid,
        i,
        i % 32,
        i / 32,
        dynamic_shared,
        &thread.async,
        &thread.dependency_waited};
    // A warp's priority counts first.
    const auto bits = static_cast<uint32_t>(random_bits());
    engine.priority[i] =
        i % 32 == 0 ? bits << 16 : (engine.priority[i / 32 * 32] & ~0xffffu) | (bits & 0xffff);
    all[i] = i;
  }
  make_ready(all, engine.num_threads);
}

void run_block() {
  while (engine.num_ready > 0 && engine.failure.empty()) {
    Thread& thread = engine.threads[next_ready()];
    engine.running = &thread;
    current = thread.current;
    thread.fiber.enter();
  }
  if (!engine.failure.empty() || engine.num_done == engine.num_threads) return;
  std::ostringstream out;
  out << "deadlock: " << engine.num_threads - engine.num_done
      << " thread(s) wait for ever, the first:";
  int shown = 0;
  for (int i = 0; i < engine.num_threads && shown < 3; ++i) {
    const Thread& thread = engine.threads[i];
    if (thread.state != State::kBlocked) continue;
    out << "\n    " << text(thread.current) << " in " << thread.waits_in << " at "
        << text(thread.site);
    ++shown;
  }
  engine.failure = out.str();
}

}  // namespace

void check_config(const LaunchConfig& config) {
  const dim3 grid = config.grid, block = config.block;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads < 1 || threads > kMaxThreads || block.z > 64) {
    throw LaunchError("invalid configuration: " + std::to_string(threads) + " threads in a block");
  }
  if (grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.x > 0x7fffffffu || grid.y > 65535 ||
      grid.z > 65535) {
    throw LaunchError("invalid configuration: grid (" + std::to_string(grid.x) + "," +
                      std::to_string(grid.y) + "," + std::to_string(grid.z) + ")");
  }
  if (config.smem_bytes > kMaxSharedBytes) {
    throw LaunchError("invalid configuration: " + std::to_string(config.smem_bytes) +
                      " bytes of dynamic shared memory");
  }
}

void run_grid(const LaunchConfig& config, const std::function<void()>& body) {
  engine.num_threads = static_cast<int>(config.block.x * config.block.y * config.block.z);
  engine.body = &body;
  engine.overlapped = config.overlapped;
  engine.random_state = options.seed * 0x9E3779B97F4A7C15ull | 1;
  engine.failure.clear();
  const auto [shared, shared_bytes] = shared_variables();
  const std::vector<uint64_t> order =
      order_of_blocks(uint64_t{config.grid.x} * config.grid.y * config.grid.z);

  release(&engine.block_start);
  for (size_t i = 0; i < order.size(); ++i) {
    engine.threads = engine.sets[options.concurrent_blocks ? i % 2 : 0];
    for (int t = 0; t < engine.num_threads; ++t) {
      if (!engine.threads[t].fiber.prepared()) engine.threads[t].fiber.prepare(run_threads);
    }
    // Of the exact size: the address sanitizer sees accesses past what the launch asked for.
    void* dynamic_shared = nullptr;
    if (posix_memalign(&dynamic_shared, 1024, config.smem_bytes > 0 ? config.smem_bytes : 1)) {
      throw std::bad_alloc();
    }
    const std::unique_ptr<void, decltype(&std::free)> owner(dynamic_shared, &std::free);
    std::memset(dynamic_shared, 0xFF, config.smem_bytes);  // NaN
    if (shared_bytes > 0) std::memset(shared, 0xFF, shared_bytes);

    start_block(config, order[i], dynamic_shared);
    if (!options.concurrent_blocks) release(&engine.block_start);
    run_block();
    if (!options.concurrent_blocks) acquire(&engine.block_end);
    if (!engine.failure.empty()) {
      for (int t = 0; t < engine.num_threads; ++t) {
        Thread& thread = engine.threads[t];
        if (thread.state != State::kDone) thread.fiber.prepare(run_threads);
      }
      break;
    }
  }
  acquire(&engine.block_end);
  if (!engine.failure.empty()) throw LaunchError(engine.failure);
}

void fail(const std::string& what, Site site) {
  engine.failure = what + " at " + text(site) + " [" + text(current) + "]";
  leave_fiber();
  std::abort();
}

int sync_threads(bool predicate, Site site) {
  Barrier& barrier = engine.barrier;
  if (barrier.num_waiting == 0) barrier.site = site;
  if (!same(barrier.site, site)) {
    fail("__syncthreads() reached at two different places by one block: " + text(barrier.site) +
             " and",
         site);
  }
  if (engine.num_done > 0) {
    fail("__syncthreads() while " + std::to_string(engine.num_done) +
             " thread(s) of the block have already returned",
         site);
  }
  release(&barrier);
  barrier.count += predicate ? 1 : 0;
  barrier.waiting[barrier.num_waiting++] = current.index;
  if (barrier.num_waiting < engine.num_threads) {
    wait_here("__syncthreads", site);
  } else {
    barrier.result = barrier.count;
    barrier.num_waiting = barrier.count = 0;
    make_ready(barrier.waiting, engine.num_threads);
    leave_fiber();
  }
  acquire(&barrier);
  return barrier.result;
}

void sync_warp(uint32_t mask, Site site) {
  Warp& warp = engine.warps[current.warp];
  release(&warp);
  warp_collective(mask, "__syncwarp", site, nullptr, [](uint32_t, void* const*) {});
  acquire(&warp);
}

void warp_collective(uint32_t mask, const char* what, Site site, void* arg, Finish finish) {
  Warp& warp = engine.warps[current.warp];
  const int lane = current.lane;
  mask &= warp.exists;
  if (!(mask >> lane & 1)) fail(std::string(what) + ": calling lane is not in its own mask", site);
  if (mask & warp.exited) {
    fail(std::string(what) + ": mask names lanes that have returned from the kernel", site);
  }
  Meeting* meeting = nullptr;
  for (int i = 0; i < warp.num_meetings; ++i) {
    if (warp.meetings[i].mask == mask) meeting = &warp.meetings[i];
  }
  if (meeting == nullptr) {
    meeting = &warp.meetings[warp.num_meetings++];
    meeting->mask = mask;
    meeting->arrived = 0;
    meeting->what = what;
    meeting->site = site;
  } else if (!same(meeting->what, what) || !same(meeting->site, site)) {
    fail(std::string("lanes of one mask met in different warp operations: ") + meeting->what +
             " at " + text(meeting->site) + " and " + what,
         site);
  }
  meeting->arrived |= 1u << lane;
  meeting->args[lane] = arg;
  if (meeting->arrived != mask) return wait_here(what, site);

  finish(mask, meeting->args);
  int others[32], count = 0;
  for (int l = 0; l < 32; ++l) {
    if ((mask >> l & 1) && l != lane) others[count++] = current.warp * 32 + l;
  }
  Meeting& last = warp.meetings[--warp.num_meetings];
  if (meeting != &last) *meeting = last;
  make_ready(others, count);
  if (options.thread_order != Order::kForward) let_others_run();
}

void fence() {
  release(&engine.fence);
  acquire(&engine.fence);
}

}  // namespace emu
