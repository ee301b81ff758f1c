// Streams, events and memory that moves, run as late as CUDA allows and in an order of the test's
// choosing: what is queued on a stream that cudaStreamCreateWithFlags made is done when somebody
// waits for it and not before, so that two streams which no event orders do meet in the wrong order.
// Any other stream (the default one, a number that a test made up) does its work at once.
#pragma once

#include <cstddef>
#include <functional>
#include <map>
#include <vector>

#include "cuda_runtime_api.h"

namespace emulator {

/// Which of the streams that could go on does.
enum class Turn { oldest_stream, newest_stream, shuffled };

enum class Kind {
  copy_to_device,
  copy_to_host,
  prefetch_to_device,
  prefetch_to_host,
  set_bytes,
  kernel,
};

/// A piece of work on a stream. `memory` is the host's side of a copy, and null of a launch.
struct Work {
  Kind kind;
  const void* memory;
  std::size_t bytes;
  cudaStream_t stream;
};

struct Streams {
  Turn turn = Turn::oldest_stream;
  unsigned seed = 1;             // of Turn::shuffled
  int calls_until_failure = -1;  // of those that make or take something, and memset; -1: none fails
  cudaError_t prefetch_error = cudaSuccess;  // of every prefetch
  bool is_managed_missing = false;           // cudaDevAttrManagedMemory
  bool is_access_exclusive = false;          // not cudaDevAttrConcurrentManagedAccess
  bool knows_device_of_stream = true;        // a driver of CUDA 12.8 or newer
  int device_count = 1;

  std::vector<Work> queued, done;  // in order
  int live = 0;                    // streams, events and memory that were not given back
  std::size_t managed_on_device_bytes = 0, peak_managed_on_device_bytes = 0;
  std::size_t evicted_bytes = 0;  // managed memory that went to the host without being asked to
  std::vector<cudaMemoryAdvise> advice;
};

/// Tests begin with `streams() = {}`.
Streams& streams();

/// Queues `run` as a kernel that works on `memory`.
void queue_kernel(cudaStream_t stream, const void* memory, std::size_t bytes,
                  std::function<void()> run);

/// A launch of a kernel, whose memory is not known.
void queue_launch(cudaStream_t stream, std::function<void()> run);

/// Whether what is queued on a stream is done later.
bool is_late(cudaStream_t stream);

/// Room for `bytes` bytes on the device, for which managed memory goes to the host.
bool make_room(std::size_t bytes);

/// Memory of cudaMalloc and of pools, which the device holds until it is forgotten.
void note_on_device(const void* memory, std::size_t bytes);

/// What cudaFree does to memory of the device, or managed memory.
void forget_memory(void* memory);

/// Whether all of a piece of managed memory is on the device.
bool is_on_device(const void* memory, std::size_t bytes);

/// Whether the call at hand is the one that the test wants to fail.
bool is_to_fail();

/// What a stream does when it comes to it, and is no work.
void when_reached(cudaStream_t stream, std::function<void()> run);

void queue_memset(const void* memory, std::size_t bytes, cudaStream_t stream,
                  std::function<void()> run);

/// A copy: on a made stream later, on others at once.
void queue_copy(cudaMemcpyKind kind, const void* host_memory, std::size_t bytes,
                cudaStream_t stream, std::function<void()> run);

/// cudaStreamSynchronize.
void wait_for(cudaStream_t stream);

/// What a launch says of a stream of another device.
bool is_of_another_device(cudaStream_t stream);

}  // namespace emulator
