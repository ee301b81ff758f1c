// The emulated device's shared memory: it finds what is planted in small kernels, and runs their
// correct versions in every order of the threads.
#include "cuda/emulator_fixture.h"
#include "cuda/mma.cuh"

namespace qlora::cuda {
namespace {

constexpr LaunchShape one_warp{1, 32, 4096}, two_warps{1, 64, 4096};

enum class Barrier { none, shuffle, warp, thread_block };

__device__ void wait_at(Barrier barrier) {
  if (barrier == Barrier::shuffle) __shfl_sync(all_lanes, 0, 0);
  if (barrier == Barrier::warp) __syncwarp();
  if (barrier == Barrier::thread_block) __syncthreads();
}

// ---- two threads that touch the same bytes

/// Thread i of 64 reads what thread i ^ distance has written, in two rounds.
__global__ void swap_kernel(int distance, Barrier after_write, Barrier after_read, int* out) {
  const int thread = static_cast<int>(threadIdx.x);
  const Shared<int> memory = dynamic_shared_memory<int>();
  for (int round = 0; round < 2; ++round) {
    memory.store(thread, 10 * thread + round);
    wait_at(after_write);
    out[64 * round + thread] = memory.load(thread ^ distance);
    wait_at(after_read);
  }
}

class EmulatorOrder : public Emulator {
 protected:
  static constexpr int oneself = 0, same_warp = 1, other_warp = 32;
  int out[128];

  void expect_runs(int distance, Barrier after_write, Barrier after_read) {
    in_every_order([&] {
      run(swap_kernel, two_warps, distance, after_write, after_read, out);
      for (int i = 0; i < 128; ++i) EXPECT_EQ(out[i], 10 * (i % 64 ^ distance) + i / 64);
    });
  }

  void expect_fails(const char* what, int distance, Barrier after_write, Barrier after_read) {
    expect_failure(what, swap_kernel, two_warps, distance, after_write, after_read, out);
  }
};

TEST_F(EmulatorOrder, RunsWhatBarriersOrder) {
  expect_runs(oneself, Barrier::none, Barrier::none);
  expect_runs(same_warp, Barrier::warp, Barrier::warp);
  expect_runs(same_warp, Barrier::thread_block, Barrier::warp);
  expect_runs(other_warp, Barrier::thread_block, Barrier::thread_block);
}

TEST_F(EmulatorOrder, FindsAMissingBarrierBetweenWriteAndRead) {
  for (const Barrier barrier : {Barrier::none, Barrier::shuffle, Barrier::warp}) {
    expect_fails(" of shared memory", other_warp, barrier, Barrier::thread_block);
  }
}

TEST_F(EmulatorOrder, FindsAMissingBarrierBetweenReadAndWrite) {
  for (const Barrier barrier : {Barrier::none, Barrier::shuffle, Barrier::warp}) {
    expect_fails(", with no __syncthreads between (the last __syncthreads was number 1, at ",
                 other_warp, Barrier::thread_block, barrier);
  }
}

TEST_F(EmulatorOrder, FindsAMissingBarrierInsideAWarp) {
  // A shuffle orders no memory, though no thread runs ahead of it.
  expect_fails(
      ", with no __syncwarp or __syncthreads between (no __syncthreads so far, no __syncwarp so "
      "far)",
      same_warp, Barrier::shuffle, Barrier::warp);
  expect_fails("the last __syncwarp was number 1, at emulator_memory_test.cpp:", same_warp,
               Barrier::warp, Barrier::shuffle);
  expect_fails(" of shared memory", same_warp, Barrier::none, Barrier::none);
}

__global__ void write_together_kernel(bool is_in_turn) {
  const Shared<int> memory = dynamic_shared_memory<int>();
  for (unsigned thread = 0; thread < 2; ++thread) {
    if (threadIdx.x == thread) memory.store(5, 1);
    if (is_in_turn) __syncthreads();
  }
}

TEST_F(Emulator, FindsTwoThreadsThatWriteTheSame) {
  in_every_order([&] { run(write_together_kernel, two_warps, true); });
  expect_failure(" writes byte 20 of shared memory, which thread ", write_together_kernel,
                 two_warps, false);
}

/// Reads by several threads, and then a write by one of them.
__global__ void read_together_kernel(int last_reader, int writer, Barrier barrier) {
  const int thread = static_cast<int>(threadIdx.x);
  const Shared<int> memory = dynamic_shared_memory<int>();
  if (thread == 0) memory.store(0, 1);
  __syncthreads();
  if (thread <= last_reader) memory.load(0);
  wait_at(barrier);
  if (thread == writer) memory.store(0, 2);
}

TEST_F(Emulator, FindsAWriteAfterReadsOfManyThreads) {
  in_every_order([&] {
    run(read_together_kernel, two_warps, 0, 0, Barrier::none);
    run(read_together_kernel, two_warps, 31, 7, Barrier::warp);
    run(read_together_kernel, two_warps, 63, 7, Barrier::thread_block);
  });
  for (const int writer : {0, 7, 31}) {  // at the shuffle all have read
    expect_failure(" has read, with no __syncwarp or", read_together_kernel, one_warp, 31, writer,
                   Barrier::shuffle);
  }
  for (const int writer : {0, 7, 31, 32, 63}) {
    for (const Barrier barrier : {Barrier::none, Barrier::warp}) {
      expect_failure(" byte 0 of shared memory", read_together_kernel, two_warps, 63, writer,
                     barrier);
    }
  }
}

// ---- one access

__global__ void read_unwritten_kernel() {
  const Shared<short> memory = dynamic_shared_memory<short>(64);
  if (threadIdx.x == 0) memory.store(0, 1);
  __syncthreads();
  memory.as<int>().load();
}

TEST_F(Emulator, FindsReadsOfUnwrittenMemory) {
  expect_failure(" reads byte 66 of shared memory, which nobody has written", read_unwritten_kernel,
                 two_warps);
}

__global__ void forget_kernel(bool is_written) {
  const Shared<int> memory = dynamic_shared_memory<int>();
  if (is_written) memory.store(static_cast<int>(threadIdx.x), 1);
  memory.load(static_cast<int>(threadIdx.x));
}

TEST_F(Emulator, GivesEachThreadBlockFreshMemory) {
  run(forget_kernel, {4, 64, 256}, true);
  expect_failure("which nobody has written", forget_kernel, two_warps, false);
}

__global__ void access_kernel(int offset, int index) {
  dynamic_shared_memory<int>(offset).store(index, 1);
}

TEST_F(Emulator, FindsAccessesOutOfRange) {
  run(access_kernel, {1, 1, 1024}, 0, 255);
  expect_failure(" touches bytes 1024 to 1027 of 1024 bytes of shared memory", access_kernel,
                 {1, 1, 1024}, 0, 256);
  expect_failure(" touches bytes 1022 to 1025 of 1024 bytes", access_kernel, {1, 1, 1024}, 1022, 0);
  expect_failure(" touches bytes -4 to -1 of 1024 bytes", access_kernel, {1, 1, 1024}, 0, -1);
  expect_failure(" touches bytes 0 to 3 of 0 bytes", access_kernel, {1, 1, 0}, 0, 0);
}

TEST_F(Emulator, FindsUnalignedAccesses) {
  expect_failure(" touches 4 bytes at byte 6 of shared memory, want a multiple of 4", access_kernel,
                 {1, 1, 1024}, 2, 1);
}

__global__ void load_global_kernel(const void* address) { load_16_bytes(address); }

TEST_F(Emulator, FindsUnalignedAccessesOfGlobalMemory) {
  alignas(16) std::uint8_t memory[32] = {};
  run(load_global_kernel, {1, 1}, memory + 16);
  expect_failure(", want a multiple of 16", load_global_kernel, {1, 1}, memory + 8);
}

TEST_F(Emulator, RefusesMoreSharedMemoryThanThereIs) {
  run(access_kernel, {1, 1, 227 * 1024}, 0, 0);
  EXPECT_THROW(run(access_kernel, {1, 1, 227 * 1024 + 1}, 0, 0), CudaError);
  emulator::device().current = 1;  // where the kernel has not asked
  cudaLaunchConfig_t config{.gridDim = 1, .blockDim = 1, .dynamicSmemBytes = 48 * 1024};
  EXPECT_EQ(cudaLaunchKernelEx(&config, access_kernel, 0, 0), cudaSuccess);
  config.dynamicSmemBytes += 1;
  EXPECT_EQ(cudaLaunchKernelEx(&config, access_kernel, 0, 0), cudaErrorInvalidValue);
}

/// Lane i writes the row that lane 31 - i loads, `offset` bytes away from where it wrote it.
__global__ void load_matrices_kernel(Barrier after_write, int offset) {
  const int lane = static_cast<int>(threadIdx.x);
  dynamic_shared_memory<Bytes16>().store(31 - lane, {});
  wait_at(after_write);
  std::uint32_t registers[4];
  load_matrices(registers, dynamic_shared_memory<Bytes16>(16 * lane + offset));
}

TEST_F(Emulator, LoadMatricesReadsAsTheLaneThatPassesTheRow) {
  in_every_order([&] { run(load_matrices_kernel, one_warp, Barrier::warp, 0); });
  expect_failure(", with no __syncwarp or", load_matrices_kernel, one_warp, Barrier::shuffle, 0);
  expect_failure("which nobody has written", load_matrices_kernel, one_warp, Barrier::warp, 512);
  expect_failure("of shared memory, want a multiple of 16", load_matrices_kernel, one_warp,
                 Barrier::warp, 8);
}

}  // namespace
}  // namespace qlora::cuda
