// SPDX-License-Identifier: Apache-2.0
#include "backend/cpu/thread_pool.h"

#include <pthread.h>
#if defined(__linux__)
#include <sched.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "medusa/error.h"

namespace medusa::cpu {
namespace {

constexpr auto kSpin =
    std::chrono::microseconds(100);  // longer than the serial code between two ops of a step
constexpr int kMaxThreads = 1024;

std::atomic<uint64_t> fork_count{0};  // how many forks lie between this process and the first one
thread_local bool inside_task = false;

void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Waits without sleeping until `ready` or the time is up; returns ready().
template <class Ready>
bool spin_until(Ready ready) {
  const auto end = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < 32; ++i) {
      if (ready()) return true;
      relax();
    }
  } while (std::chrono::steady_clock::now() < end);
  return ready();
}

int usable_processors() {
#if defined(__linux__)
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof(set), &set) == 0 && CPU_COUNT(&set) > 0) return CPU_COUNT(&set);
#endif
  const unsigned count = std::thread::hardware_concurrency();
  return count == 0 ? 1 : static_cast<int>(count);
}

}  // namespace

// A ticket is (job << 32 | tasks not yet claimed). A worker claims by exchanging the whole ticket,
// so a claim that succeeds proves that this job is still open; `body` and `num_tasks` cannot change
// before the claimed task is done, and are read only after the claim. (A stale exchange could
// succeed only if a worker slept through 2^32 jobs.)
struct ThreadPool::State {
  alignas(64) std::atomic<uint64_t> ticket{0};
  alignas(64) std::atomic<int> unfinished{0};
  alignas(64) std::atomic<int> sleepers{0};
  std::atomic<bool> stop{false};
  int num_tasks = 0;
  const TaskRef* body = nullptr;
  std::mutex error_mutex;
  std::exception_ptr error;

  std::mutex run_mutex;  // one job at a time
  std::mutex sleep_mutex;
  std::condition_variable wake;
  std::vector<std::thread> threads;
  uint64_t born = fork_count.load();

  // Claims and runs tasks until the current job has none left.
  void help() {
    uint64_t seen = ticket.load(std::memory_order_acquire);
    while ((seen & 0xffffffffu) != 0) {
      if (!ticket.compare_exchange_weak(seen, seen - 1, std::memory_order_acq_rel,
                                        std::memory_order_acquire)) {
        continue;
      }
      try {
        (*body)(num_tasks - static_cast<int>(seen & 0xffffffffu));
      } catch (...) {
        const std::lock_guard lock(error_mutex);
        if (!error) error = std::current_exception();
      }
      unfinished.fetch_sub(1, std::memory_order_acq_rel);
      seen = ticket.load(std::memory_order_acquire);
    }
  }
};

ThreadPool::ThreadPool(int num_threads) {
  MEDUSA_CHECK_ARG(num_threads >= 0 && num_threads <= kMaxThreads, "threads is ", num_threads,
                   "; choose 0 (all processors) to ", kMaxThreads);
  num_threads_ = num_threads > 0 ? num_threads : usable_processors();
  if (num_threads_ == 1) return;
  static const int registered = pthread_atfork(nullptr, nullptr, [] { fork_count.fetch_add(1); });
  static_cast<void>(registered);
  state_ = std::make_unique<State>();
  state_->threads.reserve(static_cast<size_t>(num_threads_ - 1));
  try {
    for (int i = 1; i < num_threads_; ++i) {
      state_->threads.emplace_back([state = state_.get()] { work(*state); });
    }
  } catch (const std::system_error&) {  // the system gives no more threads: make do with these
    num_threads_ = 1 + static_cast<int>(state_->threads.size());
  }
}

ThreadPool::~ThreadPool() {
  if (!state_) return;
  if (state_->born != fork_count.load()) {
    // The workers live in the parent only: neither they nor what they wait on can be torn down
    // here.
    static_cast<void>(state_.release());
    return;
  }
  {
    const std::lock_guard lock(state_->sleep_mutex);
    state_->stop = true;
  }
  state_->wake.notify_all();
  for (std::thread& thread : state_->threads) thread.join();
}

void ThreadPool::work(State& state) {
  inside_task = true;
  const auto open = [&] { return (state.ticket.load() & 0xffffffffu) != 0 || state.stop.load(); };
  while (!state.stop) {
    if (!spin_until(open)) {
      // No wake-up is lost: either this thread sees the new ticket after counting itself, or run(),
      // which publishes the ticket before it reads the count, sees the sleeper (all four are
      // seq_cst).
      std::unique_lock lock(state.sleep_mutex);
      state.sleepers.fetch_add(1);
      state.wake.wait(lock, open);
      state.sleepers.fetch_sub(1);
    }
    state.help();
  }
}

void ThreadPool::run(int num_tasks, TaskRef body) {
  if (num_tasks <= 1 || !state_ || inside_task ||
      state_->born != fork_count.load(std::memory_order_relaxed)) {
    for (int task = 0; task < num_tasks; ++task) body(task);
    return;
  }
  State& state = *state_;
  const std::lock_guard turn(state.run_mutex);
  state.body = &body;
  state.num_tasks = num_tasks;
  state.unfinished.store(num_tasks, std::memory_order_relaxed);
  const uint64_t job = (state.ticket.load(std::memory_order_relaxed) >> 32) + 1;
  state.ticket.store(job << 32 | static_cast<uint64_t>(num_tasks));
  if (state.sleepers.load() > 0) {
    {
      const std::lock_guard lock(state.sleep_mutex);
    }  // a worker between its check and its sleep holds this
    state.wake.notify_all();
  }

  inside_task = true;
  state.help();
  inside_task = false;
  const auto done = [&] { return state.unfinished.load(std::memory_order_acquire) == 0; };
  if (!spin_until(done)) {
    while (!done()) std::this_thread::yield();
  }
  if (state.error) std::rethrow_exception(std::exchange(state.error, nullptr));
}

}  // namespace medusa::cpu
