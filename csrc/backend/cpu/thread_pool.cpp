// SPDX-License-Identifier: Apache-2.0
#include "backend/cpu/thread_pool.h"

#include <pthread.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
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

#include "backend/cpu/limits.h"
#include "medusa/error.h"

namespace medusa::cpu {
namespace {

constexpr auto kSpin =
    std::chrono::microseconds(100);  // longer than the serial code between two ops of a step
constexpr int kMaxThreads = 1024;

std::atomic<uint64_t> fork_count{0};  // how many forks lie between this process and the first one
thread_local bool inside_task = false;
thread_local int own_index = 0;

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

// While it lives, this thread rounds to nearest and keeps denormals, as the bits of every result
// presume; callers may have set otherwise.
class FloatMode {
 public:
  FloatMode() : saved_(get()) {
    if ((saved_ & kControl) != kDefault) set(kDefault);
  }
  ~FloatMode() {
    if ((saved_ & kControl) != kDefault) set(saved_);
  }
  FloatMode(const FloatMode&) = delete;
  FloatMode& operator=(const FloatMode&) = delete;

 private:
#if defined(__x86_64__)
  using Word = unsigned;
  static constexpr Word kControl = ~0x3fu;  // the rest are flags of past exceptions
  static constexpr Word kDefault = 0x1f80;  // every exception masked
  static Word get() { return _mm_getcsr(); }
  static void set(Word word) { _mm_setcsr(word); }
#elif defined(__aarch64__)
  using Word = uint64_t;
  static constexpr Word kControl = ~Word{0}, kDefault = 0;
  static Word get() {
    Word word;
    asm volatile("mrs %0, fpcr" : "=r"(word));
    return word;
  }
  static void set(Word word) { asm volatile("msr fpcr, %0" : : "r"(word) : "memory"); }
#else
  using Word = int;
  static constexpr Word kControl = 0, kDefault = 0;
  static Word get() { return 0; }
  static void set(Word) {}
#endif

  Word saved_;
};

}  // namespace

// A ticket is (job << 32 | tasks not yet claimed). A worker claims by exchanging the whole ticket,
// so a claim that succeeds proves that this job is still open; `body` and `num_tasks` cannot change
// before the claimed task is done, and are read only after the claim. (A stale exchange could
// succeed only if a worker slept through 2^32 jobs.)
struct ThreadPool::State {
  alignas(64) std::atomic<uint64_t> ticket{0};
  alignas(64) std::atomic<int> unfinished{0};
  alignas(64) std::atomic<int> awake{0};  // workers with a permit; changes under sleep_mutex
  std::atomic<bool> caller_sleeps{false};
  std::atomic<bool> stop{false};
  int most_awake = 0;  // more than there are processors would only keep each other from running
  int permits = 0;     // given to workers that have not taken them yet
  int num_tasks = 0;
  const TaskRef* body = nullptr;
  std::mutex error_mutex;
  std::exception_ptr error;

  std::mutex run_mutex;  // one job at a time
  std::mutex sleep_mutex;
  std::condition_variable wake, done;
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
      // Either this thread sees the caller asleep, or the caller, which says so first, sees 0 (all
      // four are seq_cst).
      if (unfinished.fetch_sub(1) == 1 && caller_sleeps.load()) {
        {
          const std::lock_guard lock(sleep_mutex);
        }  // a caller between its check and its sleep holds this
        done.notify_one();
      }
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
      state_->threads.emplace_back([state = state_.get(), i] {
        own_index = i;
        work(*state);
      });
    }
  } catch (const std::system_error&) {  // the system gives no more threads: make do with these
    num_threads_ = 1 + static_cast<int>(state_->threads.size());
  }
  state_->most_awake = std::min(num_threads_, usable_processors()) - 1;
}

int ThreadPool::thread_index() { return own_index; }

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
  const FloatMode mode;
  inside_task = true;
  const auto open = [&] { return (state.ticket.load() & 0xffffffffu) != 0 || state.stop.load(); };
  const auto sleep = [&](std::unique_lock<std::mutex>& lock) {
    state.wake.wait(lock, [&] { return state.permits > 0 || state.stop; });
    if (state.permits > 0) --state.permits;
  };
  {
    std::unique_lock lock(state.sleep_mutex);
    sleep(lock);
  }
  while (!state.stop) {
    state.help();
    if (spin_until(open)) continue;
    // No wake-up is lost: either this thread sees the new ticket after giving up its permit, or
    // run(), which publishes the ticket before it counts the permits, sees one less (all four are
    // seq_cst).
    std::unique_lock lock(state.sleep_mutex);
    state.awake.fetch_sub(1);
    if (open()) {
      state.awake.fetch_add(1);
    } else {
      sleep(lock);
    }
  }
}

void ThreadPool::run(int num_tasks, TaskRef body) {
  const FloatMode mode;
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
  const int wanted = std::min(num_tasks - 1, state.most_awake);
  if (state.awake.load() < wanted) {
    int more = 0;
    {
      const std::lock_guard lock(state.sleep_mutex);
      more = std::max(0, wanted - state.awake.load());  // a worker may have stayed awake after all
      state.awake.fetch_add(more);
      state.permits += more;
    }
    for (; more > 0; --more) state.wake.notify_one();
  }

  inside_task = true;
  state.help();
  inside_task = false;
  const auto done = [&] { return state.unfinished.load() == 0; };
  if (!spin_until(done)) {
    std::unique_lock lock(state.sleep_mutex);
    state.caller_sleeps = true;
    state.done.wait(lock, done);
    state.caller_sleeps = false;
  }
  if (state.error) std::rethrow_exception(std::exchange(state.error, nullptr));
}

}  // namespace medusa::cpu
