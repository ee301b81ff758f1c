#include "cuda/emulation/emulator.h"

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

namespace emulator {
namespace {

constexpr std::size_t stack_bytes = 256 * 1024;
constexpr unsigned lanes = 32;

[[noreturn]] void fail(const char* reason) {
  std::fprintf(stderr, "emulator: %s\n", reason);
  std::abort();  // a fiber cannot throw into the test
}

/// Where a fixed number of fibers meet.
struct Rendezvous {
  unsigned expected = 0, arrived = 0, generation = 0;
};

struct Warp {
  Rendezvous rendezvous;
  // Two sets, used in turn: a lane can be one exchange ahead of another that has still to read.
  std::array<std::array<std::uint64_t, lanes>, 2> slots;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[stack_bytes]};
  bool is_done = false;
};

struct ThreadBlock {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Rendezvous rendezvous;
  ucontext_t scheduler;
  const std::function<void()>* body = nullptr;
  unsigned running = 0;
  bool has_progressed = false;  // since the scheduler last looked
};

ThreadBlock block;

void yield() { swapcontext(&block.fibers[block.running].context, &block.scheduler); }

void meet(Rendezvous& rendezvous) {
  const unsigned generation = rendezvous.generation;
  if (++rendezvous.arrived == rendezvous.expected) {
    rendezvous.arrived = 0;
    ++rendezvous.generation;
    block.has_progressed = true;
    return;
  }
  while (rendezvous.generation == generation) yield();
}

void fiber_main() {
  (*block.body)();
  block.fibers[block.running].is_done = true;
  block.has_progressed = true;
  yield();
}

/// 0 to count - 1, in the order that the test wants.
std::vector<unsigned> in_order(unsigned count) {
  std::vector<unsigned> out(count);
  std::iota(out.begin(), out.end(), 0u);
  if (device().order == Order::descending) std::reverse(out.begin(), out.end());
  if (device().order == Order::shuffled) std::shuffle(out.begin(), out.end(), std::mt19937(count));
  return out;
}

/// Warps take turns, and in its turn a warp goes as far as it can: one that a barrier fails to hold
/// back runs far ahead of the others.
void run_fibers(unsigned threads, Index& thread_index) {
  const std::vector<unsigned> warp_order = in_order(static_cast<unsigned>(block.warps.size()));
  const std::vector<unsigned> lane_order = in_order(lanes);
  for (unsigned done = 0; done < threads;) {
    bool has_round_progressed = false;
    for (const unsigned warp : warp_order) {
      do {
        block.has_progressed = false;
        for (const unsigned lane : lane_order) {
          const unsigned t = warp * lanes + lane;
          if (t >= threads || block.fibers[t].is_done) continue;
          block.running = thread_index.x = t;
          swapcontext(&block.scheduler, &block.fibers[t].context);
          done += block.fibers[t].is_done;
        }
        has_round_progressed |= block.has_progressed;
      } while (block.has_progressed);
    }
    if (!has_round_progressed) fail("threads wait for others that do not come");
  }
}

void run_thread_block(unsigned threads, Index& thread_index) {
  block.warps.assign((threads + lanes - 1) / lanes, {});
  for (unsigned t = 0; t < threads; ++t) ++block.warps[t / lanes].rendezvous.expected;
  block.rendezvous = {.expected = threads};
  while (block.fibers.size() < threads) block.fibers.emplace_back();
  for (unsigned t = 0; t < threads; ++t) {
    Fiber& fiber = block.fibers[t];
    fiber.is_done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = stack_bytes;
    makecontext(&fiber.context, fiber_main, 0);
  }
  run_fibers(threads, thread_index);
}

}  // namespace

Device& device() {
  static Device the_device;
  return the_device;
}

cudaError_t run(unsigned thread_blocks, unsigned threads, cudaStream_t stream, Index& thread_index,
                Index& block_index, Index& grid_size, const std::function<void()>& thread) {
  if (thread_blocks == 0 || threads == 0 || threads > 1024) return cudaErrorInvalidValue;
  if (device().launch_error != cudaSuccess) return device().launch_error;
  ++device().launch_count;
  device().stream = stream;
  block.body = &thread;
  grid_size.x = std::min(thread_blocks, device().max_thread_blocks);
  for (block_index.x = 0; block_index.x < grid_size.x; ++block_index.x) {
    run_thread_block(threads, thread_index);
  }
  return cudaSuccess;
}

std::uint64_t exchange_in_warp(unsigned mask, std::uint64_t bits, int source_lane) {
  if (mask != 0xffffffff) fail("only exchanges of whole warps are emulated");
  Warp& warp = block.warps[block.running / lanes];
  if (warp.rendezvous.expected != lanes) fail("an exchange in a warp of fewer than 32 threads");
  auto& slots = warp.slots[warp.rendezvous.generation % 2];
  slots[block.running % lanes] = bits;
  meet(warp.rendezvous);
  return slots[static_cast<std::size_t>(source_lane)];
}

void wait_for_thread_block() { meet(block.rendezvous); }

}  // namespace emulator

using emulator::device;

cudaError_t cudaGetLastError() { return cudaSuccess; }

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
    case cudaErrorIllegalAddress: return "cudaErrorIllegalAddress";
    default: return "cudaError";
  }
}

const char* cudaGetErrorString(cudaError_t) { return "as the emulator was told"; }

cudaError_t cudaDriverGetVersion(int* version) {
  *version = device().driver_version;
  return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* index) {
  *index = device().current;
  return device().driver_error;
}

cudaError_t cudaSetDevice(int index) {
  device().current = index;
  return device().driver_error;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = device().major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = device().minor; break;
    case cudaDevAttrMemoryPoolsSupported: *value = device().has_memory_pools; break;
  }
  return device().driver_error;
}

cudaError_t cudaMalloc(void** memory, std::size_t bytes) {
  if (device().is_out_of_memory) return cudaErrorMemoryAllocation;
  *memory = std::malloc(bytes);
  std::memset(*memory, 0xa5, bytes);  // poison: nothing may rely on fresh memory
  ++device().live_allocations;
  return cudaSuccess;
}

cudaError_t cudaFree(void* memory) {
  std::free(memory);
  --device().live_allocations;
  return cudaSuccess;
}

cudaError_t cudaMallocAsync(void** memory, std::size_t bytes, cudaStream_t) {
  if (!device().has_memory_pools) return cudaErrorInvalidValue;
  return cudaMalloc(memory, bytes);
}

cudaError_t cudaFreeAsync(void* memory, cudaStream_t) { return cudaFree(memory); }

cudaError_t cudaMemsetAsync(void* memory, int byte, std::size_t bytes, cudaStream_t) {
  std::memset(memory, byte, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* destination, const void* source, std::size_t bytes,
                            cudaMemcpyKind, cudaStream_t) {
  std::memcpy(destination, source, bytes);
  return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = device().is_capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t) {
  ++device().synchronize_count;
  return cudaSuccess;
}
