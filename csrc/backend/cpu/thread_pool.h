// Threads that share the tasks of one op. Which thread takes which task never changes a result.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <memory>
#include <type_traits>

namespace medusa::cpu {

// A borrowed callable `void(int task)`; it must outlive the call it is passed to.
class TaskRef {
 public:
  template <class F>
    requires(!std::is_same_v<std::remove_cvref_t<F>, TaskRef>)
  TaskRef(F&& body)  // NOLINT: implicit, so that lambdas pass as they are
      : object_(const_cast<void*>(static_cast<const void*>(&body))),
        call_([](void* object, int task) {
          (*static_cast<std::remove_reference_t<F>*>(object))(task);
        }) {}
  void operator()(int task) const { call_(object_, task); }

 private:
  void* object_;
  void (*call_)(void*, int);
};

class ThreadPool {
 public:
  // 0: all processors this process may use (affinity, container quota). ArgumentError outside
  // [0, 1024]. No more threads than processors are ever awake.
  explicit ThreadPool(int num_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int num_threads() const { return num_threads_; }
  // 0 on a thread that calls run(), 1 to num_threads() - 1 on a pool's own.
  static int thread_index();

  // body(task) once for every task in [0, num_tasks), the caller helping; returns when all are done
  // and rethrows the first exception. Calls from several threads take turns. A call from inside a
  // task, or in a forked child (whose workers do not exist), runs all tasks itself.
  // Tasks always run with the default floating-point mode; the caller's is restored.
  void run(int num_tasks, TaskRef body);

 private:
  struct State;
  static void work(State& state);

  int num_threads_;
  std::unique_ptr<State> state_;  // null: no workers
};

}  // namespace medusa::cpu
