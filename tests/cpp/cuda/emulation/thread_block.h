// The thread block that runs: what its fibers call.
#pragma once

#include <array>
#include <cstddef>
#include <source_location>
#include <string>

namespace emulator {

inline constexpr unsigned lanes = 32;
inline constexpr unsigned all_lanes = 0xffffffff;

/// The thread that runs, in its thread block.
unsigned this_thread();

/// Ends the launch with an error that names the thread and says what it did: "reads byte 4 ...".
/// Threads are left where they are. (An exception could not leave a fiber.)
[[noreturn]] void fail(const std::string& what);

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
