// A stack of its own that runs a function piece by piece.
#pragma once

#include <cstddef>
#include <memory>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulator {

class Fiber {
 public:
  Fiber();

  /// What the next resume begins with, whatever ran here before. `entry` never returns: its last
  /// act is finish.
  void start(void (*entry)());

  /// Runs the fiber until it suspends or finishes. Called outside of all fibers.
  void resume();

  /// Called by the fiber that runs: back to who resumed it.
  static void suspend();
  [[noreturn]] static void finish();

 private:
  static constexpr std::size_t stack_bytes = 256 * 1024;

  static void enter();
  static void leave(void** fake_stack);

  std::unique_ptr<char[]> stack_;
  void (*entry_)() = nullptr;
  bool has_begun_ = false;  // and not finished: functions' variables are on the stack
#if defined(__x86_64__)
  void* stack_pointer_ = nullptr;
#else
  ucontext_t context_;
#endif
};

}  // namespace emulator
