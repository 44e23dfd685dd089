// SPDX-License-Identifier: Apache-2.0
#include "emulator/fiber.h"

#include <sys/mman.h>

#include <cstddef>
#include <cstdio>
#include <cstdlib>

// The engine is never instrumented: it tells the sanitizers what it does. EMU_ASAN and EMU_TSAN
// say what the kernels are compiled with.
#ifdef EMU_ASAN
extern "C" {
void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t num_bytes);
void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, size_t* num_bytes);
void __asan_unpoison_memory_region(const volatile void* memory, size_t num_bytes);
}
#endif
#ifdef EMU_TSAN
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
}
#endif

// Saves the registers that a call preserves, then loads those of the other side.
#if defined(__x86_64__)
extern "C" void emu_switch_stack(void** save, void* load);
asm(R"(
.text
.globl emu_switch_stack
.hidden emu_switch_stack
.type emu_switch_stack, @function
emu_switch_stack:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size emu_switch_stack, . - emu_switch_stack
)");
#else
#error "the CUDA emulator runs on x86-64 only: write the stack switch of this processor"
#endif

namespace emu {
namespace {

#if defined(EMU_ASAN) || defined(EMU_TSAN)
constexpr size_t kStackBytes = 512 << 10;  // instrumented frames are larger
#else
constexpr size_t kStackBytes = 128 << 10;
#endif
constexpr size_t kGuardBytes = 4096;

// Whoever called enter(); one at a time, as launches exclude each other.
Fiber* running = nullptr;
void* caller_stack_pointer = nullptr;
[[maybe_unused]] void* caller_fake_stack = nullptr;
[[maybe_unused]] const void* caller_stack = nullptr;
[[maybe_unused]] size_t caller_stack_bytes = 0;
[[maybe_unused]] void* caller_tsan_fiber = nullptr;

char* map_stack() {
  void* memory = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, kGuardBytes, PROT_NONE) != 0) {
    std::perror("CUDA emulator: no memory for a stack");
    std::abort();
  }
  return static_cast<char*>(memory) + kGuardBytes;
}

}  // namespace

void Fiber::begin() {
#ifdef EMU_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &caller_stack, &caller_stack_bytes);
#endif
  running->entry_();
  std::abort();
}

void Fiber::prepare(void (*entry)()) {
  if (stack_ == nullptr) {
    stack_ = map_stack();
#ifdef EMU_TSAN
    tsan_fiber_ = __tsan_create_fiber(0);
#endif
  }
#ifdef EMU_ASAN
  __asan_unpoison_memory_region(stack_, kStackBytes);
#endif
  entry_ = entry;
  fake_stack_ = nullptr;
  // What emu_switch_stack pops: six registers, the address it returns to, and one word more, so
  // that the stack is aligned as after a call.
  void** top = reinterpret_cast<void**>(stack_ + kStackBytes);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&Fiber::begin);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  stack_pointer_ = top;
}

void Fiber::enter() {
  running = this;
#ifdef EMU_ASAN
  __sanitizer_start_switch_fiber(&caller_fake_stack, stack_, kStackBytes);
#endif
#ifdef EMU_TSAN
  caller_tsan_fiber = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(tsan_fiber_, 1);  // 1: the switch itself orders nothing
#endif
  emu_switch_stack(&caller_stack_pointer, stack_pointer_);
#ifdef EMU_ASAN
  __sanitizer_finish_switch_fiber(caller_fake_stack, nullptr, nullptr);
#endif
}

void Fiber::leave() {
#ifdef EMU_ASAN
  __sanitizer_start_switch_fiber(&fake_stack_, caller_stack, caller_stack_bytes);
#endif
#ifdef EMU_TSAN
  __tsan_switch_to_fiber(caller_tsan_fiber, 1);
#endif
  emu_switch_stack(&stack_pointer_, caller_stack_pointer);
#ifdef EMU_ASAN
  __sanitizer_finish_switch_fiber(fake_stack_, &caller_stack, &caller_stack_bytes);
#endif
}

}  // namespace emu
