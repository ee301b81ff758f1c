// Stands in for CUDA's header of this name: the words that a kernel is written in, meaning what
// they mean on a device.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "cuda/emulation/emulator.h"
#include "cuda_runtime_api.h"

#define __device__
#define __global__
#define __launch_bounds__(threads)
#define __shared__ static  // thread blocks run one after another

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
  return emulator::run(config->gridDim.x, config->blockDim.x, config->stream, threadIdx, blockIdx,
                       gridDim, [=] { kernel(arguments...); });
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  static_assert(sizeof(T) <= sizeof(std::uint64_t));
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int source_lane = (lane & -width) | (source & (width - 1));
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = emulator::exchange_in_warp(mask, bits, source_lane);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int distance) {
  return __shfl_sync(mask, value, static_cast<int>(threadIdx.x % 32) ^ distance);
}

inline void __syncthreads() { emulator::wait_for_thread_block(); }

inline unsigned long long atomicMin(unsigned long long* address, unsigned long long value) {
  const unsigned long long old = *address;
  *address = std::min(old, value);
  return old;
}
