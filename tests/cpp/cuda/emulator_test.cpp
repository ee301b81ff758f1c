// The emulated device itself: it finds what is planted in small kernels, and runs their correct
// versions in every order.
#include <numeric>

#include "cuda/copy_async.cuh"
#include "cuda/launch.cuh"
#include "cuda/mma.cuh"
#include "cuda/support.h"

namespace qlora::cuda {
namespace {

class Emulator : public CudaEmulation {
 protected:
  template <typename... Parameters, typename... Arguments>
  void run(void (*kernel)(Parameters...), const LaunchShape& shape, const Arguments&... arguments) {
    launch("a test", kernel, shape, nullptr, arguments...);
  }

  /// The kernel fails, and the error says `what`.
  template <typename... Parameters, typename... Arguments>
  void expect_failure(const char* what, void (*kernel)(Parameters...), const LaunchShape& shape,
                      const Arguments&... arguments) {
    in_every_order([&] {
      try {
        run(kernel, shape, arguments...);
        ADD_FAILURE() << "no error, want: " << what;
      } catch (const CudaError& error) {
        EXPECT_PRED_FORMAT2(testing::IsSubstring, "a test: cudaErrorLaunchFailure: thread block 0",
                            error.what());
        EXPECT_PRED_FORMAT2(testing::IsSubstring, what, error.what());
      }
      emulator::device().failure.clear();
    });
  }
};

// ---- order of shared memory

enum class Barrier { none, warp, thread_block };

__device__ void wait_at(Barrier barrier) {
  if (barrier == Barrier::warp) __syncwarp();
  if (barrier == Barrier::thread_block) __syncthreads();
}

/// Each thread reads what the thread `distance` further on has written, twice.
__global__ void rotate_kernel(int distance, Barrier after_write, Barrier after_read, int* out) {
  const int thread = static_cast<int>(threadIdx.x), threads = 64;
  const Shared<int> memory = dynamic_shared_memory<int>();
  for (int round = 0; round < 2; ++round) {
    memory.store(thread, 10 * thread + round);
    wait_at(after_write);
    out[round * threads + thread] = memory.load((thread + distance) % threads);
    wait_at(after_read);
  }
}

constexpr LaunchShape two_warps{1, 64, 64 * sizeof(int)};

TEST_F(Emulator, RunsWhatBarriersOrder) {
  in_every_order([&] {
    std::vector<int> out(128);
    run(rotate_kernel, two_warps, 32, Barrier::thread_block, Barrier::thread_block, out.data());
    for (int i = 0; i < 128; ++i) EXPECT_EQ(out[i], (i % 64 + 32) % 64 * 10 + i / 64);
    run(rotate_kernel, two_warps, 0, Barrier::none, Barrier::none, out.data());
    for (int i = 0; i < 128; ++i) EXPECT_EQ(out[i], i % 64 * 10 + i / 64);
  });
}

TEST_F(Emulator, FindsAMissingBarrierBetweenWriteAndRead) {
  std::vector<int> out(128);
  for (const Barrier barrier : {Barrier::none, Barrier::warp}) {
    expect_failure("of shared memory", rotate_kernel, two_warps, 32, barrier, Barrier::thread_block,
                   out.data());
  }
}

TEST_F(Emulator, FindsAMissingBarrierBetweenReadAndWrite) {
  std::vector<int> out(128);
  for (const Barrier barrier : {Barrier::none, Barrier::warp}) {
    expect_failure("with no __syncthreads between", rotate_kernel, two_warps, 32,
                   Barrier::thread_block, barrier, out.data());
  }
}

}  // namespace
}  // namespace qlora::cuda
