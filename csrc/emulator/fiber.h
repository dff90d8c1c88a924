// Fibers: many flows of control on one thread of the operating system, each with a stack of its own.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdlib>

#include "emulator/sanitizer.h"

#if !defined(__x86_64__) && !defined(EMULATOR_UCONTEXT)
#define EMULATOR_UCONTEXT
#endif
#ifdef EMULATOR_UCONTEXT
#include <ucontext.h>
#endif

namespace emulator {

#ifndef EMULATOR_UCONTEXT
// Pushes the registers that a call preserves, exchanges the stacks (rdi: where to keep the old one, rsi: the new one)
// and takes the other fiber's registers. The rounding mode is the same for all fibers and stays. Returns are predicted
// well, since the fibers of a warp mostly wait at the same place.
__attribute__((naked, noinline, no_sanitize("address", "thread", "undefined"))) inline void exchange_stacks(void**,
                                                                                                            void*) {
  asm("pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n"
      "ret\n");
}
#endif

// A default-constructed fiber stands for the flow of control that first switches away from it.
class Fiber {
 public:
  // The next switch to this fiber calls `entry`, which must call `arrived` first and must never return.
  void start(unsigned char* stack, size_t bytes, void (*entry)()) {
    allow(stack, bytes);  // what an abandoned fiber left there
#ifdef EMULATOR_ADDRESS_SANITIZER
    stack_ = stack;
    stack_bytes_ = bytes;
    fake_stack_ = nullptr;
#endif
#ifdef EMULATOR_THREAD_SANITIZER
    if (!known_as_) known_as_ = __tsan_create_fiber(0);
#endif
#ifdef EMULATOR_UCONTEXT
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack;
    context_.uc_stack.ss_size = bytes;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
#else
    // As exchange_stacks leaves a stack: six registers, the address to go on at, and the empty place of a caller.
    void** top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack + bytes) & ~uintptr_t{15});
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(entry);
    for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
    stack_pointer_ = top;
#endif
  }

  void switch_to(Fiber& other) {
#ifdef EMULATOR_ADDRESS_SANITIZER
    other.came_from_ = this;
    __sanitizer_start_switch_fiber(&fake_stack_, other.stack_, other.stack_bytes_);
#endif
    exchange(other);
    arrived();
  }

  [[noreturn]] void end_in(Fiber& other) {
#ifdef EMULATOR_ADDRESS_SANITIZER
    other.came_from_ = this;
    __sanitizer_start_switch_fiber(nullptr, other.stack_, other.stack_bytes_);
#endif
    exchange(other);
    std::abort();
  }

  void arrived() {
#ifdef EMULATOR_ADDRESS_SANITIZER
    __sanitizer_finish_switch_fiber(fake_stack_, &came_from_->stack_, &came_from_->stack_bytes_);
#endif
  }

 private:
  void exchange(Fiber& other) {
#ifdef EMULATOR_THREAD_SANITIZER
    known_as_ = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(other.known_as_, __tsan_switch_to_fiber_no_sync);
#endif
#ifdef EMULATOR_UCONTEXT
    swapcontext(&context_, &other.context_);
#else
    exchange_stacks(&stack_pointer_, other.stack_pointer_);
#endif
  }

#ifdef EMULATOR_UCONTEXT
  ucontext_t context_;
#else
  void* stack_pointer_ = nullptr;
#endif
#ifdef EMULATOR_ADDRESS_SANITIZER
  Fiber* came_from_ = nullptr;
  void* fake_stack_ = nullptr;
  const void* stack_ = nullptr;
  size_t stack_bytes_ = 0;
#endif
#ifdef EMULATOR_THREAD_SANITIZER
  void* known_as_ = nullptr;
#endif
};

}  // namespace emulator
