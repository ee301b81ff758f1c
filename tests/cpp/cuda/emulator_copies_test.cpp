// The emulated device's asynchronous copies: a pipeline that runs in every order of the threads, and
// what is found in it with one bug at a time.
#include <vector>

#include "cuda/copy_async.cuh"
#include "cuda/emulator_fixture.h"

namespace qlora::cuda {
namespace {

constexpr LaunchShape one_warp{1, 32, 4096}, two_warps{1, 64, 4096};

enum class Bug {
  none,
  no_commit,
  no_wait,
  too_short_a_wait,
  no_barrier_after_the_wait,
  no_barrier_after_the_reads,
  write_under_a_copy,
  unaligned_source,
};

/// out[64 t + i] = in[64 t + 63 - i] by tiles of 64 with two buffers, one filling while the other
/// is read.
__global__ void reverse_tiles_kernel(const Bytes16* in, Bytes16* out, int tiles, Bug bug) {
  const int thread = static_cast<int>(threadIdx.x);
  const Shared<Bytes16> buffers = dynamic_shared_memory<Bytes16>();
  const auto begin_copy = [&](int tile) {
    const Shared<Bytes16> to = buffers + (tile % 2 * 64 + thread);
    const void* from = in + 64 * tile + thread;
    if (bug == Bug::unaligned_source) from = static_cast<const std::uint8_t*>(from) + 8;
    if (tile < tiles) {
      copy_async_16(to, from);
      if (bug == Bug::write_under_a_copy) to.store(0, {});
    }
    if (bug != Bug::no_commit) commit_copies();
  };
  begin_copy(0);
  for (int tile = 0; tile < tiles; ++tile) {
    begin_copy(tile + 1);
    if (bug == Bug::too_short_a_wait) {
      wait_for_copies<2>();
    } else if (bug != Bug::no_wait) {
      wait_for_copies<1>();
    }
    if (bug != Bug::no_barrier_after_the_wait) __syncthreads();
    out[64 * tile + thread] = buffers.load(tile % 2 * 64 + 63 - thread);
    if (bug != Bug::no_barrier_after_the_reads) __syncthreads();
  }
}

class EmulatorCopies : public Emulator {
 protected:
  static constexpr int tiles = 3;
  Bytes16 in[64 * tiles + 1], out[64 * tiles];

  void SetUp() override {
    Emulator::SetUp();
    for (std::uint32_t i = 0; i < 64 * tiles; ++i) in[i] = {{i, 2 * i, 3 * i, 4 * i}};
  }

  void expect_fails(const char* what, Bug bug) {
    expect_failure(what, reverse_tiles_kernel, two_warps, in, out, tiles, bug);
  }
};

TEST_F(EmulatorCopies, RunsAPipeline) {
  in_every_order([&] {
    run(reverse_tiles_kernel, two_warps, in, out, tiles, Bug::none);
    for (int i = 0; i < 64 * tiles; ++i) {
      EXPECT_EQ(out[i].words[3], in[i / 64 * 64 + 63 - i % 64].words[3]);
    }
  });
}

TEST_F(EmulatorCopies, FindsAReadBeforeTheWait) {
  for (const Bug bug : {Bug::no_commit, Bug::no_wait, Bug::too_short_a_wait}) {
    expect_fails(" reads byte ", bug);
    expect_fails("to which a copy is on its way that thread ", bug);
  }
}

TEST_F(EmulatorCopies, FindsAWriteUnderACopy) {
  expect_fails(" writes byte ", Bug::write_under_a_copy);
  expect_fails("to which a copy is on its way that thread ", Bug::write_under_a_copy);
}

TEST_F(EmulatorCopies, FindsAMissingBarrierAfterTheWait) {
  expect_fails(" of shared memory, ", Bug::no_barrier_after_the_wait);
}

TEST_F(EmulatorCopies, FindsACopyIntoMemoryThatOthersStillRead) {
  expect_fails(" of shared memory, ", Bug::no_barrier_after_the_reads);
}

TEST_F(EmulatorCopies, FindsAnUnalignedSource) {
  expect_fails(" copies 16 bytes to shared memory from 0x", Bug::unaligned_source);
}

enum class Until { issued, committed, waited_for };

__global__ void copy_kernel(const Bytes16* in, int count, int offset, Until until,
                            std::uint32_t* out) {
  const int thread = static_cast<int>(threadIdx.x);
  const Shared<Bytes16> to = dynamic_shared_memory<Bytes16>(offset) + thread;
  copy_async_16(to, in + thread, thread < count);
  if (until == Until::issued) return;
  commit_copies();
  if (until == Until::committed) return;
  wait_for_copies<0>();
  out[thread] = to.load().words[1];
}

TEST_F(EmulatorCopies, WriteZerosAndReadNothingBeyondTheSource) {
  const std::vector<Bytes16> five(in, in + 5);  // ASan sees a read beyond it
  std::uint32_t words[32];
  run(copy_kernel, one_warp, five.data(), 5, 0, Until::waited_for, words);
  for (std::uint32_t i = 0; i < 32; ++i) EXPECT_EQ(words[i], i < 5 ? 2 * i : 0);
}

TEST_F(EmulatorCopies, FindsOnesThatAThreadLeavesBehind) {
  std::uint32_t words[32];
  for (const Until until : {Until::issued, Until::committed}) {
    expect_failure(" returns without having waited for 1 of its copies to shared memory",
                   copy_kernel, one_warp, in, 32, 0, until, words);
  }
}

TEST_F(EmulatorCopies, FindsAnUnalignedDestination) {
  std::uint32_t words[32];
  expect_failure(" at byte ", copy_kernel, one_warp, in, 32, 8, Until::waited_for, words);
}

}  // namespace
}  // namespace qlora::cuda
