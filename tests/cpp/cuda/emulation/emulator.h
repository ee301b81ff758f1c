// A device made of fibers, to run the CUDA backend on the host: one fiber for each thread of a
// thread block, and a rendezvous where threads exchange or wait.
//
// A launch fails, with cudaErrorLaunchFailure and the reason in Device::failure, where a kernel
// breaks a rule that a device might let pass: a barrier or warp instruction that some threads miss,
// or reach by another path; shared memory that is read before it is written, or that two threads
// touch without a barrier between (shared_memory.h); a copy's destination touched before the copy
// is waited for; addresses out of range or unaligned.
//
// To see where in a kernel that was, set a breakpoint on emulator::fail.
//
// What it cannot show: races in global memory, also between thread blocks, which run one after the
// other; speed; how a device rounds the sums in its tensor cores; what nvcc makes of the source.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <set>
#include <source_location>
#include <string>
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

  /// What cudaMalloc, pools and managed memory that is there take of. Where a piece finds no room,
  /// managed memory that was used longest ago goes to the host.
  std::size_t memory_bytes = std::size_t{1} << 40;
  bool evicts_managed_memory = true;  // else a prefetch that finds no room is refused

  bool has_memory_pools = true;
  bool is_out_of_memory = false;
  bool is_capturing = false;
  int driver_version = 13000;
  cudaError_t driver_error = cudaSuccess;  // of every call
  cudaError_t launch_error = cudaSuccess;
  Order order = Order::ascending;  // in which thread blocks, warps and lanes take turns
  unsigned seed = 1;               // of Order::shuffled
  unsigned max_thread_blocks =
      0xffffffff;  // a launch is cut down to so many: a loop over the grid makes good for the rest

  int max_shared_bytes = 227 * 1024;  // that a kernel may ask for

  int current = 0;                // cudaSetDevice
  std::set<int> without_context;  // devices that nobody has set or used
  cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;  // of the one thread
  int broken_captures = 0;  // calls that a capture does not survive, while one went on
  int attribute_count = 0;  // cudaFuncSetAttribute
  int launch_count = 0;
  int synchronize_count = 0;
  int memory_info_count = 0;  // cudaMemGetInfo
  int live_allocations = 0;
  cudaStream_t stream = nullptr;  // of the last launch
  unsigned thread_blocks = 0;     // that the last launch asked for
  std::string failure;            // what a kernel did wrong, of the last launch that failed
};

/// The one device. Tests begin with `device() = {}`.
Device& device();

/// Memory that counts among live_allocations and takes nothing of the device's.
cudaError_t allocate_on_host(void** memory, std::size_t bytes);

/// A call that invalidates a capture, unless the thread's mode allows it.
void note_unsafe_call();

/// What a kernel has asked for on the current device, in any test so far.
std::size_t allowed_shared_bytes(const void* kernel);

/// Loads a kernel's code on the current device, as its first launch there does, for which there must
/// be memory. What has been loaded in any test so far stays.
cudaError_t load(const void* kernel);

/// What the pools of a device keep when nobody uses them, of those made in any test so far.
std::uint64_t kept_bytes_of_pools(int index);

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
void wait_for_thread_block(std::source_location where);
void wait_for_warp(unsigned mask, std::source_location where);

/// Copies `bytes` bytes at `mine` to `all`, and those of the other lanes of the warp, which all
/// reach the same `instruction`.
void gather_in_warp(const char* instruction, unsigned mask, const void* mine, std::size_t bytes,
                    void* all, std::source_location where);

template <typename T>
std::array<T, 32> gather_in_warp(const char* instruction, unsigned mask, const T& mine,
                                 std::source_location where) {
  static_assert(std::is_trivially_copyable_v<T>);
  std::array<T, 32> all;
  gather_in_warp(instruction, mask, &mine, sizeof mine, all.data(), where);
  return all;
}

/// The bytes of one lane.
void shuffle(const char* instruction, unsigned mask, const void* mine, std::size_t bytes,
             unsigned from_lane, void* out, std::source_location where);

/// The number of the fiber's lane.
unsigned lane();

/// Fails unless `address` is a multiple of `alignment`.
void check_aligned(const void* address, std::size_t alignment);

/// Fails if `address` is in shared memory, where only what follows is emulated.
void check_global(const void* address);

/// The thread block's shared memory, and what every access to it goes by.
std::byte* shared_memory();
void load_shared(const void* address, std::size_t bytes, std::size_t alignment, void* out);
void store_shared(void* address, std::size_t bytes, std::size_t alignment, const void* value);

template <typename T>
T load_shared(const T* address) {
  T value;
  load_shared(address, sizeof(T), alignof(T), &value);
  return value;
}

template <typename T>
void store_shared(T* address, const T& value) {
  store_shared(address, sizeof(T), alignof(T), &value);
}

/// cp.async, cp.async.commit_group and cp.async.wait_group: the bytes land at the wait.
void copy_async(void* to, const void* from, std::size_t bytes, bool is_inside);
void commit_copies();
void wait_for_copies(int pending);

/// ldmatrix.x4, plain or .trans.
void load_matrices(std::uint32_t (&r)[4], const void* row, bool is_transposed);

/// mma.m16n8k16 of bf16 or fp16 with fp32 sums.
template <typename T>
void multiply_accumulate(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]);

}  // namespace emulator
