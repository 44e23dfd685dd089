// The thread pool: every task once, whoever calls, however long the workers slept, and exceptions
// come out.
// SPDX-License-Identifier: Apache-2.0
#include "backend/cpu/thread_pool.h"

#include <sys/wait.h>
#include <unistd.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <atomic>
#include <chrono>
#include <limits>
#include <map>
#include <mutex>
#include <set>
#include <stdexcept>
#include <thread>

#include "backend/cpu/limits.h"
#include "check.h"
#include "medusa/error.h"

using medusa::cpu::ThreadPool;

namespace {

// Whether each of `num_tasks` tasks runs exactly once.
bool runs_each_once(ThreadPool& pool, int num_tasks) {
  std::vector<std::atomic<int>> runs(static_cast<size_t>(num_tasks));
  pool.run(num_tasks, [&](int task) { runs[static_cast<size_t>(task)].fetch_add(1); });
  for (const auto& count : runs) {
    if (count != 1) return false;
  }
  return true;
}

}  // namespace

TEST(each_task_runs_once) {
  for (const int threads : {1, 2, 5}) {
    ThreadPool pool(threads);
    CHECK(pool.num_threads() == threads);
    for (int round = 0; round < 300; ++round) CHECK(runs_each_once(pool, round % 40));
    CHECK(runs_each_once(pool, 10000));
  }
}

TEST(results_are_visible_to_the_caller) {
  ThreadPool pool(3);
  std::vector<int> plain(500);  // not atomic: a missing barrier is a race that TSan reports
  for (int round = 1; round <= 200; ++round) {
    pool.run(500, [&](int task) { plain[static_cast<size_t>(task)] += 1; });
    for (const int value : plain) CHECK(value == round);
  }
}

TEST(sleepers_wake) {
  ThreadPool pool(4);
  for (int round = 0; round < 30; ++round) {
    CHECK(runs_each_once(pool, 64));
    std::this_thread::sleep_for(std::chrono::milliseconds(round % 3));
  }
}

TEST(exceptions_reach_the_caller_and_leave_the_pool_usable) {
  ThreadPool pool(3);
  for (int round = 0; round < 50; ++round) {
    CHECK_THROWS(std::runtime_error, "task 7", pool.run(20, [](int task) {
      if (task == 7) throw std::runtime_error("task 7");
    }));
    CHECK(runs_each_once(pool, 20));
  }
  ThreadPool alone(1);
  CHECK_THROWS(std::runtime_error, "alone",
               alone.run(1, [](int) { throw std::runtime_error("alone"); }));
}

TEST(callers_take_turns) {
  ThreadPool pool(3);
  std::atomic<int> wrong{0};
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 4; ++caller) {
    callers.emplace_back([&] {
      for (int round = 0; round < 200; ++round) wrong += !runs_each_once(pool, 17);
    });
  }
  for (std::thread& caller : callers) caller.join();
  CHECK(wrong == 0);
}

TEST(a_task_may_call_run) {
  ThreadPool pool(3);
  std::atomic<int> runs{0};
  pool.run(8, [&](int) { pool.run(8, [&](int) { ++runs; }); });
  CHECK(runs == 64);
}

TEST(pools_come_and_go) {
  for (int round = 0; round < 100; ++round) {
    ThreadPool pool(3);
    if (round % 2 == 0) CHECK(runs_each_once(pool, 5));
  }
  CHECK_THROWS(medusa::ArgumentError, "threads", ThreadPool{-1});
  CHECK_THROWS(medusa::ArgumentError, "threads", ThreadPool{100000});
}

TEST(a_caller_outwaits_long_tasks) {
  ThreadPool pool(3);
  for (int round = 0; round < 20; ++round) {
    std::atomic<int> finished{0};
    pool.run(3, [&](int task) {  // whoever takes the last one keeps the caller waiting, asleep
      std::this_thread::sleep_for(std::chrono::milliseconds(task == 2 ? 3 : 0));
      ++finished;
    });
    CHECK(finished == 3);
  }
}

// Products rely on it: each thread reads a range of its own.
TEST(every_thread_has_its_own_index) {
  constexpr int kThreads = 3;
  ThreadPool pool(kThreads);
  CHECK(ThreadPool::thread_index() == 0);
  std::atomic<bool> outside{false};
  std::map<std::thread::id, std::set<int>> seen;
  std::mutex mutex;
  for (int round = 0; round < 50; ++round) {
    pool.run(kThreads, [&](int) {
      const int index = ThreadPool::thread_index();
      if (index < 0 || index >= kThreads) outside = true;
      const std::lock_guard lock(mutex);
      seen[std::this_thread::get_id()].insert(index);
    });
  }
  CHECK(!outside);
  std::set<int> all;
  for (const auto& [thread, indices] : seen) {
    CHECK(indices.size() == 1);
    CHECK(all.insert(*indices.begin()).second);
  }
  CHECK(seen[std::this_thread::get_id()] == std::set<int>{0});
}

#if defined(__x86_64__)
TEST(tasks_keep_denormals_whatever_the_caller_set) {
  constexpr unsigned kFlush = 0x8040;  // flush-to-zero and denormals-are-zero
  const unsigned before = _mm_getcsr();
  ThreadPool early(3);
  _mm_setcsr(before | kFlush);
  ThreadPool late(3);  // its workers inherit the caller's mode
  for (ThreadPool* pool : {&early, &late}) {
    for (const int num_tasks : {1, 64}) {
      std::atomic<int> lost{0};
      pool->run(num_tasks, [&](int) {
        volatile float small = std::numeric_limits<float>::min();
        lost += small * 0.5f == 0.0f;
        std::this_thread::yield();
      });
      CHECK(lost == 0);
      CHECK((_mm_getcsr() & kFlush) == kFlush);
    }
  }
  _mm_setcsr(before);
}
#endif

TEST(a_quota_is_whole_processors) {
  using medusa::cpu::quota_processors;
  CHECK(quota_processors("200000", "100000") == 2);
  CHECK(quota_processors("150000", "100000") == 2);
  CHECK(quota_processors("1000", "100000") == 1);
  CHECK(quota_processors("9223372036854775807", "1") == std::numeric_limits<int>::max());
  for (const char* none : {"max", "-1", "0", "", "1x", "9223372036854775808"}) {
    CHECK(quota_processors(none, "100000") == 0);
    CHECK(quota_processors("100000", none) == 0);
  }
  CHECK(medusa::cpu::usable_processors() >= 1);
}

// ThreadSanitizer does not follow a fork of a process with threads.
#ifndef __SANITIZE_THREAD__
TEST(a_forked_child_works_alone) {
  ThreadPool pool(3);
  CHECK(runs_each_once(pool, 10));
  const pid_t child = fork();
  if (child == 0) _exit(runs_each_once(pool, 10) ? 0 : 1);
  int status = -1;
  CHECK(waitpid(child, &status, 0) == child);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  CHECK(runs_each_once(pool, 10));
}
#endif
