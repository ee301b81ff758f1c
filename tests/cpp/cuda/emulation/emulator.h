// A device made of fibers, to run the CUDA backend on the host: one fiber for each thread of a
// thread block, and a rendezvous where threads exchange or wait. A shuffle or barrier that some of
// its threads do not reach is an error, not a wait.
//
// What it cannot show: races between rendezvous (fibers take turns there and nowhere else), memory
// ordering, speed, and what nvcc makes of the source.
#pragma once

#include <cstdint>
#include <functional>

#include "cuda_runtime_api.h"

namespace emulator {

struct Index {
  unsigned x = 0;
};

enum class Order { ascending, descending, shuffled };

/// The device and the driver, as a test wants them, and what the backend did with them.
struct Device {
  int major = 9, minor = 0;
  bool has_memory_pools = true;
  bool is_out_of_memory = false;
  bool is_capturing = false;
  int driver_version = 13000;
  cudaError_t driver_error = cudaSuccess;  // of every call
  cudaError_t launch_error = cudaSuccess;
  Order order = Order::ascending;  // in which warps and their lanes take turns
  unsigned max_thread_blocks =
      0xffffffff;  // a launch is cut down to so many: a loop over the grid makes good for the rest

  int current = 0;  // cudaSetDevice
  int launch_count = 0;
  int synchronize_count = 0;
  int live_allocations = 0;
  cudaStream_t stream = nullptr;  // of the last launch
};

/// The one device. Tests begin with `device() = {}`.
Device& device();

/// Runs `thread` for every thread of every thread block, keeping the three indices up to date.
cudaError_t run(unsigned thread_blocks, unsigned threads, cudaStream_t stream, Index& thread_index,
                Index& block_index, Index& grid_size, const std::function<void()>& thread);

/// Called by a fiber: leaves `bits` for the other lanes of its warp, and takes those of
/// `source_lane`.
std::uint64_t exchange_in_warp(unsigned mask, std::uint64_t bits, int source_lane);

/// Called by a fiber: __syncthreads.
void wait_for_thread_block();

}  // namespace emulator
