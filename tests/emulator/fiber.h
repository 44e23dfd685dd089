// A stack of its own for every CUDA thread, switched by hand: a kernel of 1024 threads is 1024
// fibers on one thread of the system.
// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace emu {

class Fiber {
 public:
  Fiber() = default;
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  bool prepared() const { return stack_pointer_ != nullptr; }
  // The next enter() runs entry(), which must never return, on an empty stack. What stood on the
  // old one is forgotten and its destructors never run.
  void prepare(void (*entry)());
  // Runs the fiber until it calls leave(). Never on a fiber.
  void enter();
  // Back to the enter() that runs this fiber. Only on the fiber itself.
  void leave();

 private:
  static void begin();

  void* stack_pointer_ = nullptr;
  char* stack_ = nullptr;
  void (*entry_)() = nullptr;
  void* fake_stack_ = nullptr;  // address sanitizer's
  void* tsan_fiber_ = nullptr;  // thread sanitizer's
};

}  // namespace emu
