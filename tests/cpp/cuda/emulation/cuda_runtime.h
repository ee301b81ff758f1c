// Stands in for CUDA's header of this name: the words that a kernel is written in, meaning what
// they mean on a device.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <source_location>

#include "cuda/emulation/emulator.h"
#include "cuda/emulation/streams.h"
#include "cuda_runtime_api.h"

#define __device__
#define __global__
#define __launch_bounds__(...)
#define __forceinline__ inline
#define __grid_constant__
#define QLORA_CUDA_EMULATION  // shared memory and warps' instructions go by emulator.h

inline emulator::Index threadIdx, blockIdx, gridDim;  // of the fiber that runs

struct dim3 {
  dim3(unsigned x_ = 1) : x(x_) {}
  unsigned x;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

template <typename... Parameters>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Parameters... arguments) {
  if (emulator::is_of_another_device(config->stream)) return cudaErrorInvalidResourceHandle;
  const emulator::Launch launch{.kernel = reinterpret_cast<const void*>(kernel),
                                .thread_blocks = config->gridDim.x,
                                .threads = config->blockDim.x,
                                .shared_bytes = config->dynamicSmemBytes,
                                .stream = config->stream};
  return emulator::run(launch, threadIdx, blockIdx, gridDim, [=] { kernel(arguments...); });
}

// The words of a warp and of a thread block. Their last argument is left out: it says where in the
// kernel they stand, for errors.

namespace emulator {

template <typename T>
T shuffle(const char* instruction, unsigned mask, T value, int lane, std::source_location where) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
  T out;
  shuffle(instruction, mask, &value, sizeof value, static_cast<unsigned>(lane), &out, where);
  return out;
}

/// One bit of each lane.
inline unsigned vote(const char* instruction, unsigned mask, int predicate,
                     std::source_location where) {
  const auto all = gather_in_warp(instruction, mask, predicate, where);
  unsigned bits = 0;
  for (unsigned lane = 0; lane < 32; ++lane) bits |= unsigned{all[lane] != 0} << lane;
  return bits;
}

}  // namespace emulator

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32,
              std::source_location where = std::source_location::current()) {
  const int lane = static_cast<int>(emulator::lane());
  const int source_lane = (lane & -width) | (source & (width - 1));
  return emulator::shuffle("__shfl_sync", mask, value, source_lane, where);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int distance,
                  std::source_location where = std::source_location::current()) {
  const int lane = static_cast<int>(emulator::lane());
  return emulator::shuffle("__shfl_xor_sync", mask, value, (lane ^ distance) & 31, where);
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance,
                   std::source_location where = std::source_location::current()) {
  const unsigned lane = emulator::lane();
  const unsigned source_lane = lane + distance < 32 ? lane + distance : lane;
  return emulator::shuffle("__shfl_down_sync", mask, value, static_cast<int>(source_lane), where);
}

inline unsigned __ballot_sync(unsigned mask, int predicate,
                              std::source_location where = std::source_location::current()) {
  return emulator::vote("__ballot_sync", mask, predicate, where);
}

inline int __any_sync(unsigned mask, int predicate,
                      std::source_location where = std::source_location::current()) {
  return emulator::vote("__any_sync", mask, predicate, where) != 0;
}

inline int __all_sync(unsigned mask, int predicate,
                      std::source_location where = std::source_location::current()) {
  return emulator::vote("__all_sync", mask, predicate, where) == 0xffffffff;
}

inline void __syncwarp(unsigned mask = 0xffffffff,
                       std::source_location where = std::source_location::current()) {
  emulator::wait_for_warp(mask, where);
}

inline void __syncthreads(std::source_location where = std::source_location::current()) {
  emulator::wait_for_thread_block(where);
}

// Fibers take turns at the words above alone: memory is never in between, and a read and a write
// here are one.

inline void __threadfence() {}

inline unsigned long long atomicMin(unsigned long long* address, unsigned long long value) {
  emulator::check_global(address);
  const unsigned long long old = *address;
  *address = std::min(old, value);
  return old;
}

inline unsigned atomicAdd(unsigned* address, unsigned value) {
  emulator::check_global(address);
  const unsigned old = *address;
  *address = old + value;
  return old;
}
