// Stands in for CUDA's header of this name: the words that a kernel is written in, meaning what
// they mean on a device.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "cuda/emulation/emulator.h"
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
  const emulator::Launch launch{.kernel = reinterpret_cast<const void*>(kernel),
                                .thread_blocks = config->gridDim.x,
                                .threads = config->blockDim.x,
                                .shared_bytes = config->dynamicSmemBytes,
                                .stream = config->stream};
  return emulator::run(launch, threadIdx, blockIdx, gridDim, [=] { kernel(arguments...); });
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int source_lane = (lane & -width) | (source & (width - 1));
  std::array<T, 32> all;
  emulator::gather_in_warp(mask, value, all);
  return all[static_cast<std::size_t>(source_lane)];
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int distance) {
  return __shfl_sync(mask, value, static_cast<int>(threadIdx.x % 32) ^ distance);
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, int distance) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  return __shfl_sync(mask, value, lane + distance < 32 ? lane + distance : lane);
}

inline unsigned __ballot_sync(unsigned mask, bool predicate) {
  std::array<std::uint32_t, 32> all;
  emulator::gather_in_warp(mask, std::uint32_t{predicate}, all);
  unsigned bits = 0;
  for (int lane = 0; lane < 32; ++lane) bits |= all[static_cast<std::size_t>(lane)] << lane;
  return bits;
}

inline bool __any_sync(unsigned mask, bool predicate) {
  return __ballot_sync(mask, predicate) != 0;
}
inline bool __all_sync(unsigned mask, bool predicate) {
  return __ballot_sync(mask, predicate) == 0xffffffffu;
}
inline void __syncwarp() { emulator::wait_for_warp(); }
inline void __threadfence() {}

inline void __syncthreads() { emulator::wait_for_thread_block(); }

inline unsigned long long atomicMin(unsigned long long* address, unsigned long long value) {
  const unsigned long long old = *address;
  *address = std::min(old, value);
  return old;
}

inline unsigned atomicAdd(unsigned* address, unsigned value) {
  const unsigned old = *address;
  *address = old + value;
  return old;
}
