// The emulated device's barriers, warp instructions, atomics, and orders of the threads.
#include <algorithm>
#include <set>

#include "cuda/emulator_fixture.h"
#include "cuda/mma.cuh"

namespace qlora::cuda {
namespace {

// ---- threads that do not meet

__global__ void leave_early_kernel(unsigned first_to_leave, bool is_block_wide) {
  if (threadIdx.x >= first_to_leave) return;
  is_block_wide ? __syncthreads() : __syncwarp();
}

TEST_F(Emulator, FindsABarrierThatSomeThreadsMiss) {
  in_every_order([&] {
    run(leave_early_kernel, {1, 64}, 64u, true);
    run(leave_early_kernel, {1, 64}, 32u, false);
    run(leave_early_kernel, {1, 40}, 40u, false);  // a warp of 8
  });
  expect_failure("threads wait for others that do not come; thread 0 waits in __syncthreads",
                 leave_early_kernel, {1, 64}, 32u, true);
  expect_failure("with 62 others of 63; 1 threads have returned", leave_early_kernel, {1, 64}, 63u,
                 true);
  expect_failure("waits in __syncwarp", leave_early_kernel, {1, 64}, 63u, false);
}

__global__ void diverge_kernel() {
  if (threadIdx.x % 64 < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

TEST_F(Emulator, FindsABarrierInADivergentBranch) {
  run(diverge_kernel, {1, 32});
  expect_failure(" waits in __syncthreads (emulator_warp_test.cpp:", diverge_kernel, {1, 64});
}

enum class Missing { nothing, a_lane, a_lane_that_votes, a_mask_bit, a_mask_bit_of_a_barrier };

__global__ void shuffle_kernel(Missing missing) {
  const bool is_odd_one = threadIdx.x == 17;
  const unsigned mask = missing == Missing::a_mask_bit ? all_lanes >> 1 : all_lanes;
  if (missing == Missing::a_mask_bit_of_a_barrier) __syncwarp(all_lanes >> 1);
  if (is_odd_one && missing == Missing::a_lane) return;
  if (is_odd_one && missing == Missing::a_lane_that_votes) {
    __any_sync(mask, 1);
  } else {
    __shfl_sync(mask, 1, 0);
  }
}

TEST_F(Emulator, FindsAShuffleThatALaneMisses) {
  in_every_order([&] { run(shuffle_kernel, {1, 64}, Missing::nothing); });
  expect_failure("waits in __shfl_sync (emulator_warp_test.cpp:", shuffle_kernel, {1, 64},
                 Missing::a_lane);
  expect_failure("__any_sync (emulator_warp_test.cpp:", shuffle_kernel, {1, 64},
                 Missing::a_lane_that_votes);
  for (const Missing missing : {Missing::a_mask_bit, Missing::a_mask_bit_of_a_barrier}) {
    expect_failure("without all lanes in its mask", shuffle_kernel, {1, 64}, missing);
  }
  expect_failure("in a warp of fewer than 32 threads", shuffle_kernel, {1, 16}, Missing::nothing);
}

__global__ void mma_kernel(unsigned lanes) {
  float d[4] = {};
  const std::uint32_t a[4] = {}, b[2] = {};
  if (threadIdx.x < lanes) multiply_accumulate<BFloat16>(d, a, b);
}

TEST_F(Emulator, FindsATensorCoreThatALaneMisses) {
  run(mma_kernel, {1, 32}, 32u);
  expect_failure("waits in mma.m16n8k16 with 30 others of 31", mma_kernel, {1, 32}, 31u);
}

TEST_F(Emulator, RunsAgainAfterAFailure) {
  expect_failure("__syncwarp", leave_early_kernel, {1, 1024}, 1u, false);
  run(leave_early_kernel, {2, 1024}, 1024u, true);
  EXPECT_THROW(run(leave_early_kernel, {1, 1025}, 2000u, true), CudaError);
  EXPECT_THROW(run(leave_early_kernel, {0, 32}, 32u, true), CudaError);
}

// ---- what the words give

struct WarpWords {
  int from_3[32], from_3_of_8[32], from_next[32], exclusive_or_5[32], down_4[32];
  double wide[32];
  unsigned ballot[32];
  int any[2][32], all[2][32];
};

__global__ void warp_words_kernel(WarpWords* out) {
  const int lane = static_cast<int>(threadIdx.x);
  out->from_3[lane] = __shfl_sync(all_lanes, 100 + lane, 3);
  out->from_3_of_8[lane] = __shfl_sync(all_lanes, 100 + lane, 3, 8);
  out->from_next[lane] = __shfl_sync(all_lanes, 100 + lane, lane + 1);
  out->exclusive_or_5[lane] = __shfl_xor_sync(all_lanes, 100 + lane, 5);
  out->down_4[lane] = __shfl_down_sync(all_lanes, 100 + lane, 4);
  out->wide[lane] = __shfl_xor_sync(all_lanes, 0.5 * lane, 31);
  out->ballot[lane] = __ballot_sync(all_lanes, lane % 5 == 2 ? 8 : 0);
  out->any[0][lane] = __any_sync(all_lanes, 0);
  out->any[1][lane] = __any_sync(all_lanes, lane == 31);
  out->all[0][lane] = __all_sync(all_lanes, lane != 31);
  out->all[1][lane] = __all_sync(all_lanes, lane + 1);
}

TEST_F(Emulator, ShufflesAndVotes) {
  in_every_order([&] {
    WarpWords out;
    run(warp_words_kernel, {1, 32}, &out);
    for (int lane = 0; lane < 32; ++lane) {
      EXPECT_EQ(out.from_3[lane], 103);
      EXPECT_EQ(out.from_3_of_8[lane], 103 + lane / 8 * 8);
      EXPECT_EQ(out.from_next[lane], lane < 31 ? 101 + lane : 100);  // the low 5 bits count
      EXPECT_EQ(out.exclusive_or_5[lane], 100 + (lane ^ 5));
      EXPECT_EQ(out.down_4[lane], lane < 28 ? 104 + lane : 100 + lane);
      EXPECT_EQ(out.wide[lane], 0.5 * (31 - lane));
      EXPECT_EQ(out.ballot[lane], 0x08421084u);
      EXPECT_EQ(out.any[0][lane], 0);
      EXPECT_EQ(out.any[1][lane], 1);
      EXPECT_EQ(out.all[0][lane], 0);
      EXPECT_EQ(out.all[1][lane], 1);
    }
  });
}

/// total = sum of 1 to the count of threads: each thread block leaves its sum, and the last one to
/// come adds them up.
__global__ void last_block_sums_kernel(unsigned* sums, unsigned* arrived, unsigned* total,
                                       unsigned long long* smallest) {
  const Shared<unsigned> is_last = dynamic_shared_memory<unsigned>();
  const unsigned number = blockIdx.x * 32 + threadIdx.x + 1;
  unsigned sum = number;
  for (unsigned distance = 16; distance > 0; distance /= 2) {
    sum += __shfl_down_sync(all_lanes, sum, distance);
  }
  atomicMin(smallest, 1000ull - number);
  if (threadIdx.x == 0) {
    sums[blockIdx.x] = sum;
    __threadfence();
    is_last.store(0, atomicAdd(arrived, 1u) == gridDim.x - 1);
  }
  __syncthreads();
  if (is_last.load() == 0 || threadIdx.x != 0) return;
  *total = 0;
  for (unsigned b = 0; b < gridDim.x; ++b) *total += sums[b];
}

TEST_F(Emulator, AddsAndMinimizesInGlobalMemory) {
  in_every_order([&] {
    unsigned sums[7], arrived = 0, total = 1;
    unsigned long long smallest = 1000;
    run(last_block_sums_kernel, {7, 32, 4}, sums, &arrived, &total, &smallest);
    EXPECT_EQ(arrived, 7u);
    EXPECT_EQ(total, 7u * 32 * (7 * 32 + 1) / 2);
    EXPECT_EQ(smallest, 1000u - 7 * 32);
  });
}

__global__ void atomic_in_shared_memory_kernel() {
  atomicAdd(dynamic_shared_memory<unsigned>().pointer(), 1u);
}

TEST_F(Emulator, RefusesAtomicsInSharedMemory) {
  expect_failure("emulated for global memory alone", atomic_in_shared_memory_kernel, {1, 1, 4});
}

// ---- orders

__global__ void note_order_kernel(unsigned* count, unsigned* order) {
  order[atomicAdd(count, 1u)] = blockIdx.x * 64 + threadIdx.x;
  __syncthreads();
  order[atomicAdd(count, 1u)] = blockIdx.x * 64 + threadIdx.x;
}

TEST_F(Emulator, RunsThreadsInTheOrderAskedFor) {
  constexpr unsigned threads = 3 * 64;
  std::set<std::vector<unsigned>> seen;
  in_every_order([&] {
    const auto note_order = [&] {
      unsigned count = 0;
      std::vector<unsigned> order(2 * threads);
      run(note_order_kernel, {3, 64}, &count, order.data());
      return order;
    };
    const std::vector<unsigned> order = note_order();
    EXPECT_TRUE(seen.insert(order).second) << "the same order twice";
    EXPECT_EQ(note_order(), order) << "another order for the same seed";
    std::vector<unsigned> twice_sorted = order;
    std::sort(twice_sorted.begin(), twice_sorted.end());
    for (unsigned i = 0; i < 2 * threads; ++i) EXPECT_EQ(twice_sorted[i], i / 2);
    if (emulator::device().order == emulator::Order::ascending) {
      EXPECT_EQ(order[0], 0u);
      EXPECT_TRUE(std::is_sorted(order.begin(), order.begin() + 64));
    }
    if (emulator::device().order == emulator::Order::descending) {
      EXPECT_EQ(order[0], threads - 1);
    }
  });
}

}  // namespace
}  // namespace qlora::cuda
