#include "cuda/emulation/fiber.h"

#include <cstdint>
#include <cstdlib>

#if defined(__SANITIZE_ADDRESS__)
#define EMULATOR_HAS_ASAN
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define EMULATOR_HAS_ASAN
#endif
#endif

#if defined(EMULATOR_HAS_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// swapcontext makes two system calls to save and restore the signal mask, and AddressSanitizer's
// clears the shadow of a whole stack besides: here a switch is a few pushes and pops.
#if defined(__x86_64__)
extern "C" void emulator_switch_stack(void** save_stack_pointer, void* stack_pointer);

asm(R"(
.text
.globl emulator_switch_stack
.hidden emulator_switch_stack
.type emulator_switch_stack, @function
emulator_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch_stack, . - emulator_switch_stack
)");
#endif

namespace emulator {
namespace {

Fiber* running;

/// The stack that resumes fibers.
struct {
#if defined(__x86_64__)
  void* stack_pointer;
#else
  ucontext_t context;
#endif
  const void* bottom;
  std::size_t bytes;
} resumer;

// AddressSanitizer is told of each switch: before it, by the stack that goes, and after it, by the
// one that comes.

void tell_before_switch([[maybe_unused]] void** fake_stack, [[maybe_unused]] const void* bottom,
                        [[maybe_unused]] std::size_t bytes) {
#if defined(EMULATOR_HAS_ASAN)
  __sanitizer_start_switch_fiber(fake_stack, bottom, bytes);
#endif
}

void tell_after_switch([[maybe_unused]] void* fake_stack, [[maybe_unused]] const void** old_bottom,
                       [[maybe_unused]] std::size_t* old_bytes) {
#if defined(EMULATOR_HAS_ASAN)
  __sanitizer_finish_switch_fiber(fake_stack, old_bottom, old_bytes);
#endif
}

void forget_variables([[maybe_unused]] const char* stack, [[maybe_unused]] std::size_t bytes) {
#if defined(EMULATOR_HAS_ASAN)
  ASAN_UNPOISON_MEMORY_REGION(stack, bytes);  // their red zones
#endif
}

}  // namespace

Fiber::Fiber() : stack_(new char[stack_bytes]) {}

void Fiber::start(void (*entry)()) {
  entry_ = entry;
  if (has_begun_) forget_variables(stack_.get(), stack_bytes);  // it was given up halfway
  has_begun_ = false;
#if defined(__x86_64__)
  // What the switch pops: six registers and the address to return to, with the stack pointer then
  // as if it had been called.
  const auto end =
      reinterpret_cast<std::uintptr_t>(stack_.get() + stack_bytes) & ~std::uintptr_t{15};
  auto* const words = reinterpret_cast<std::uintptr_t*>(end) - 8;
  for (int i = 0; i < 8; ++i) words[i] = 0;
  words[6] = reinterpret_cast<std::uintptr_t>(&Fiber::enter);
  stack_pointer_ = words;
#else
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack_.get();
  context_.uc_stack.ss_size = stack_bytes;
  makecontext(&context_, &Fiber::enter, 0);
#endif
}

void Fiber::enter() {
  tell_after_switch(nullptr, &resumer.bottom, &resumer.bytes);
  running->entry_();
  std::abort();
}

void Fiber::resume() {
  running = this;
  has_begun_ = true;
  void* fake_stack = nullptr;
  tell_before_switch(&fake_stack, stack_.get(), stack_bytes);
#if defined(__x86_64__)
  emulator_switch_stack(&resumer.stack_pointer, stack_pointer_);
#else
  swapcontext(&resumer.context, &context_);
#endif
  tell_after_switch(fake_stack, nullptr, nullptr);
}

void Fiber::leave(void** fake_stack) {
  tell_before_switch(fake_stack, resumer.bottom, resumer.bytes);
#if defined(__x86_64__)
  emulator_switch_stack(&running->stack_pointer_, resumer.stack_pointer);
#else
  swapcontext(&running->context_, &resumer.context);
#endif
}

void Fiber::suspend() {
  void* fake_stack = nullptr;
  leave(&fake_stack);
  tell_after_switch(fake_stack, &resumer.bottom, &resumer.bytes);
}

void Fiber::finish() {
  running->has_begun_ = false;
  leave(nullptr);
  std::abort();
}

}  // namespace emulator
