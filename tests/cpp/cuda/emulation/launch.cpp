// Launches: what a device refuses, and the grid of thread blocks, one after the other.
#include "cuda/emulation/emulator.h"
#include "cuda/emulation/sequence.h"
#include "cuda/emulation/streams.h"
#include "cuda/emulation/thread_block.h"

namespace emulator {
namespace {

constexpr std::size_t shared_bytes_without_asking = 48 * 1024;
constexpr unsigned max_threads = 1024;
constexpr unsigned max_thread_blocks = 0x7fffffff;

cudaError_t run_grid(const Launch& launch, Index& thread_index, Index& block_index,
                     Index& grid_size, const std::function<void()>& thread) {
  grid_size.x = std::min(launch.thread_blocks, device().max_thread_blocks);
  std::mt19937 random(device().seed);
  Sequence thread_blocks(grid_size.x, random);
  for (const unsigned index : thread_blocks.next()) {
    block_index.x = index;
    const std::string failure =
        run_thread_block(index, launch.threads, launch.shared_bytes, thread, thread_index, random);
    if (!failure.empty()) {
      device().failure = failure;
      return cudaErrorLaunchFailure;
    }
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t run(const Launch& launch, Index& thread_index, Index& block_index, Index& grid_size,
                const std::function<void()>& thread) {
  if (launch.thread_blocks == 0 || launch.thread_blocks > max_thread_blocks ||
      launch.threads == 0 || launch.threads > max_threads) {
    return cudaErrorInvalidValue;
  }
  if (launch.shared_bytes > shared_bytes_without_asking &&
      launch.shared_bytes > allowed_shared_bytes(launch.kernel)) {
    return cudaErrorInvalidValue;
  }
  if (device().launch_error != cudaSuccess) return device().launch_error;
  if (const cudaError_t error = load(launch.kernel); error != cudaSuccess) return error;
  ++device().launch_count;
  device().stream = launch.stream;
  device().thread_blocks = launch.thread_blocks;
  if (is_late(launch.stream)) {  // what goes wrong then is told at a synchronisation
    queue_launch(launch.stream, [=, &thread_index, &block_index, &grid_size] {
      run_grid(launch, thread_index, block_index, grid_size, thread);
    });
    return cudaSuccess;
  }
  cudaError_t error = cudaSuccess;
  queue_launch(launch.stream,
               [&] { error = run_grid(launch, thread_index, block_index, grid_size, thread); });
  return error;
}

}  // namespace emulator
