// One thread block: its fibers, and what they call.
#pragma once

#include <array>
#include <cstddef>
#include <functional>
#include <random>
#include <source_location>
#include <string>

#include "cuda/emulation/emulator.h"

namespace emulator {

inline constexpr unsigned lanes = 32;
inline constexpr unsigned all_lanes = 0xffffffff;

/// Runs `body` for each of `threads` threads. The reason why it failed, or nothing.
std::string run_thread_block(unsigned index, unsigned threads, std::size_t shared_bytes,
                             const std::function<void()>& body, Index& thread_index,
                             std::mt19937& random);

/// The thread that runs, in its thread block.
unsigned this_thread();

/// Ends the launch with an error that names this thread and says what it did: "reads byte 4 ...".
/// The other threads are left where they are.
[[noreturn]] void fail(const std::string& what);

/// "kernel.cuh:12".
std::string text(std::source_location where);

/// What each lane leaves for the others.
struct Slots {
  static constexpr std::size_t bytes_per_lane = 64;
  alignas(8) std::array<std::array<std::byte, bytes_per_lane>, lanes> of_lane;
};

/// The whole warp meets in `instruction`, each lane leaving `bytes` bytes at `mine`. When all are
/// there, `work` is done once, if there is any. The slots stay until the warp's next but one
/// meeting.
const Slots& exchange_in_warp(const char* instruction, unsigned mask, const void* mine,
                              std::size_t bytes, void (*work)(Slots&) = nullptr,
                              std::source_location where = {});

}  // namespace emulator
