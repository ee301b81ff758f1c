// A device made of fibers, to run the CUDA backend on the host: one fiber for each thread of a
// thread block, and a rendezvous where threads exchange or wait. A shuffle or barrier that some of
// its threads do not reach is an error, not a wait.
//
// What it cannot show: races between rendezvous (fibers take turns there and nowhere else), memory
// ordering, speed, and what nvcc makes of the source.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <type_traits>

#include "cuda_runtime_api.h"
#include "format/float16.h"

namespace emulator {

struct Index {
  unsigned x = 0;
};

enum class Order { ascending, descending, shuffled };

/// The device and the driver, as a test wants them, and what the backend did with them.
struct Device {
  // The backend asks for these once for each device index: a test that changes them takes an index
  // that no other test uses.
  int major = 9, minor = 0;
  int multiprocessor_count = 132;
  int l2_bytes = 50 << 20;

  bool has_memory_pools = true;
  bool is_out_of_memory = false;
  bool is_capturing = false;
  int driver_version = 13000;
  cudaError_t driver_error = cudaSuccess;  // of every call
  cudaError_t launch_error = cudaSuccess;
  Order order = Order::ascending;  // in which warps and their lanes take turns
  unsigned max_thread_blocks =
      0xffffffff;  // a launch is cut down to so many: a loop over the grid makes good for the rest

  int max_shared_bytes = 227 * 1024;  // that a kernel may ask for

  int current = 0;                                     // cudaSetDevice
  std::map<const void*, std::size_t> shared_bytes_of;  // what kernels have asked for
  int launch_count = 0;
  int synchronize_count = 0;
  int live_allocations = 0;
  cudaStream_t stream = nullptr;  // of the last launch
};

/// The one device. Tests begin with `device() = {}`.
Device& device();

/// One launch of a kernel.
struct Launch {
  const void* kernel;
  unsigned thread_blocks, threads;
  std::size_t shared_bytes;
  cudaStream_t stream;
};

/// Runs `thread` for every thread of every thread block, keeping the three indices up to date.
cudaError_t run(const Launch& launch, Index& thread_index, Index& block_index, Index& grid_size,
                const std::function<void()>& thread);

// ---- what follows is called by fibers

/// __syncthreads and __syncwarp.
void wait_for_thread_block();
void wait_for_warp();

/// Leaves `bytes` bytes at `mine` for the other lanes of the warp, and copies those of all 32 to
/// `all`.
void gather_in_warp(unsigned mask, const void* mine, std::size_t bytes, void* all);

template <typename T>
void gather_in_warp(unsigned mask, const T& mine, std::array<T, 32>& all) {
  static_assert(std::is_trivially_copyable_v<T>);
  gather_in_warp(mask, &mine, sizeof mine, all.data());
}

/// The number of the fiber's lane.
unsigned lane();

/// The thread block's shared memory, and what every access to it goes by.
std::byte* shared_memory();
void check_shared_read(const void* address, std::size_t bytes);
void check_shared_write(const void* address, std::size_t bytes);

template <typename T>
T load_shared(const T* address) {
  check_shared_read(address, sizeof(T));
  T value;
  std::memcpy(&value, address, sizeof value);
  return value;
}

template <typename T>
void store_shared(T* address, const T& value) {
  check_shared_write(address, sizeof(T));
  std::memcpy(address, &value, sizeof value);
}

/// cp.async, cp.async.commit_group and cp.async.wait_group: the bytes land at the wait.
void copy_async(void* to, const void* from, std::size_t bytes, bool is_inside);
void commit_copies();
void wait_for_copies(int pending);

/// ldmatrix.x4, plain or .trans.
void load_matrices(std::uint32_t (&r)[4], const void* row, bool is_transposed);

/// mma.m16n8k16 with `to_double` reading a 16-bit element.
void multiply_accumulate(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2],
                         double (*to_double)(std::uint16_t bits));

template <typename T>
void multiply_accumulate(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  multiply_accumulate(
      d, a, b, [](std::uint16_t bits) { return static_cast<double>(qlora::to_float(T{bits})); });
}

}  // namespace emulator
