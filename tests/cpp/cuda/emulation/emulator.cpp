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

#include "cuda/emulation/streams.h"

namespace emulator {
namespace {

constexpr std::size_t stack_bytes = 256 * 1024;
constexpr unsigned lanes = 32;
constexpr std::size_t bytes_per_slot = 64;
constexpr std::size_t shared_bytes_without_asking = 48 * 1024;

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
  std::array<std::array<std::array<std::byte, bytes_per_slot>, lanes>, 2> slots;
};

/// A cp.async on its way.
struct Copy {
  void* to;
  const void* from;
  std::size_t bytes;
  bool is_inside;
};

struct Fiber {
  ucontext_t context;
  std::vector<Copy> open_copies;             // of no group yet
  std::vector<std::vector<Copy>> committed;  // groups that have not landed
  std::unique_ptr<char[]> stack{new char[stack_bytes]};
  bool is_done = false;
};

struct ThreadBlock {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Rendezvous rendezvous;
  std::vector<std::byte> shared;
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

void run_thread_block(unsigned threads, std::size_t shared_bytes, Index& thread_index) {
  block.shared.assign(shared_bytes, std::byte{0xff});  // poison
  block.warps.assign((threads + lanes - 1) / lanes, {});
  for (unsigned t = 0; t < threads; ++t) ++block.warps[t / lanes].rendezvous.expected;
  block.rendezvous = {.expected = threads};
  while (block.fibers.size() < threads) block.fibers.emplace_back();
  for (unsigned t = 0; t < threads; ++t) {
    Fiber& fiber = block.fibers[t];
    fiber.is_done = false;
    fiber.open_copies.clear();
    fiber.committed.clear();
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

cudaError_t run(const Launch& launch, Index& thread_index, Index& block_index, Index& grid_size,
                const std::function<void()>& thread) {
  if (launch.thread_blocks == 0 || launch.threads == 0 || launch.threads > 1024) {
    return cudaErrorInvalidValue;
  }
  if (launch.shared_bytes > shared_bytes_without_asking &&
      launch.shared_bytes > device().shared_bytes_of[launch.kernel]) {
    return cudaErrorInvalidValue;
  }
  if (device().launch_error != cudaSuccess) return device().launch_error;
  ++device().launch_count;
  device().stream = launch.stream;
  block.body = &thread;
  grid_size.x = std::min(launch.thread_blocks, device().max_thread_blocks);
  for (block_index.x = 0; block_index.x < grid_size.x; ++block_index.x) {
    run_thread_block(launch.threads, launch.shared_bytes, thread_index);
  }
  return cudaSuccess;
}

void wait_for_thread_block() { meet(block.rendezvous); }

void wait_for_warp() { meet(block.warps[block.running / lanes].rendezvous); }

unsigned lane() { return block.running % lanes; }

void gather_in_warp(unsigned mask, const void* mine, std::size_t bytes, void* all) {
  if (mask != 0xffffffff) fail("only exchanges of whole warps are emulated");
  if (bytes > bytes_per_slot) fail("too many bytes in one exchange");
  Warp& warp = block.warps[block.running / lanes];
  if (warp.rendezvous.expected != lanes) fail("an exchange in a warp of fewer than 32 threads");
  auto& slots = warp.slots[warp.rendezvous.generation % 2];
  std::memcpy(slots[lane()].data(), mine, bytes);
  meet(warp.rendezvous);
  for (std::size_t i = 0; i < lanes; ++i) {
    std::memcpy(static_cast<std::byte*>(all) + i * bytes, slots[i].data(), bytes);
  }
}

std::byte* shared_memory() { return block.shared.data(); }

void check_shared_read(const void* address, std::size_t bytes) {
  const auto* const begin = static_cast<const std::byte*>(address);
  if (begin < block.shared.data() || begin + bytes > block.shared.data() + block.shared.size()) {
    fail("an access beyond the thread block's shared memory");
  }
  if (reinterpret_cast<std::uintptr_t>(address) % bytes != 0) fail("an unaligned access");
}

void check_shared_write(const void* address, std::size_t bytes) {
  check_shared_read(address, bytes);
}

void copy_async(void* to, const void* from, std::size_t bytes, bool is_inside) {
  check_shared_write(to, bytes);
  block.fibers[block.running].open_copies.push_back({to, from, bytes, is_inside});
}

void commit_copies() {
  Fiber& fiber = block.fibers[block.running];
  fiber.committed.push_back(std::move(fiber.open_copies));
  fiber.open_copies.clear();
}

void wait_for_copies(int pending) {
  auto& groups = block.fibers[block.running].committed;
  while (groups.size() > static_cast<std::size_t>(pending)) {
    for (const Copy& copy : groups.front()) {
      if (copy.is_inside) {
        std::memcpy(copy.to, copy.from, copy.bytes);
      } else {
        std::memset(copy.to, 0, copy.bytes);
      }
    }
    groups.erase(groups.begin());
  }
}

void load_matrices(std::uint32_t (&r)[4], const void* row, bool is_transposed) {
  check_shared_read(row, 16);
  std::array<std::array<std::uint16_t, 8>, lanes> rows;  // row j of matrix i is rows[8 i + j]
  gather_in_warp(0xffffffff, row, 16, rows.data());
  const unsigned i = lane() / 4, j = 2 * (lane() % 4);
  for (unsigned matrix = 0; matrix < 4; ++matrix) {
    const auto element = [&](unsigned at_row, unsigned column) {
      return std::uint32_t{rows[8 * matrix + at_row][column]};
    };
    r[matrix] = is_transposed ? element(j, i) | element(j + 1, i) << 16
                              : element(i, j) | element(i, j + 1) << 16;
  }
}

void multiply_accumulate(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2],
                         double (*to_double)(std::uint16_t bits)) {
  struct Registers {
    std::uint32_t a[4], b[2];
  };
  Registers mine;
  std::memcpy(mine.a, a, sizeof mine.a);
  std::memcpy(mine.b, b, sizeof mine.b);
  std::array<Registers, lanes> all;
  gather_in_warp(0xffffffff, mine, all);
  // Transcribed from the PTX manual's tables: where an element of A or B is.
  const auto half = [](std::uint32_t word, unsigned odd) {
    return static_cast<std::uint16_t>(word >> 16 * odd);
  };
  const auto element_a = [&](unsigned row, unsigned k) {
    const Registers& holder = all[row % 8 * 4 + k % 8 / 2];
    return to_double(half(holder.a[row / 8 + k / 8 * 2], k % 2));
  };
  const auto element_b = [&](unsigned k, unsigned column) {
    return to_double(half(all[column * 4 + k % 8 / 2].b[k / 8], k % 2));
  };
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = lane() / 4 + i / 2 * 8, column = lane() % 4 * 2 + i % 2;
    double sum = 0.0;
    for (unsigned k = 0; k < 16; ++k) sum += element_a(row, k) * element_b(k, column);
    d[i] = static_cast<float>(static_cast<double>(d[i]) + sum);
  }
}

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
    case cudaDevAttrMultiProcessorCount: *value = device().multiprocessor_count; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = device().max_shared_bytes; break;
    case cudaDevAttrL2CacheSize: *value = device().l2_bytes; break;
    case cudaDevAttrManagedMemory: *value = !emulator::streams().is_managed_missing; break;
    case cudaDevAttrConcurrentManagedAccess:
      *value = !emulator::streams().is_managed_missing && !emulator::streams().is_access_exclusive;
      break;
    case cudaDevAttrMemoryPoolsSupported: *value = device().has_memory_pools; break;
  }
  return device().driver_error;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  if (value > device().max_shared_bytes) return cudaErrorInvalidValue;
  device().shared_bytes_of[kernel] = static_cast<std::size_t>(value);
  return cudaSuccess;
}

cudaError_t cudaMalloc(void** memory, std::size_t bytes) {
  if (device().is_out_of_memory || emulator::is_to_fail()) return cudaErrorMemoryAllocation;
  *memory = std::malloc(bytes);
  if (*memory == nullptr) return cudaErrorMemoryAllocation;
  std::memset(*memory, 0xa5, bytes);  // poison: nothing may rely on fresh memory
  ++device().live_allocations;
  return cudaSuccess;
}

cudaError_t cudaFree(void* memory) {
  emulator::forget_managed(memory);
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
                            cudaMemcpyKind kind, cudaStream_t stream) {
  emulator::queue_copy(kind, kind == cudaMemcpyHostToDevice ? source : destination, bytes, stream,
                       [=] { std::memcpy(destination, source, bytes); });
  return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = device().is_capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  ++device().synchronize_count;
  emulator::wait_for(stream);
  return cudaSuccess;
}
