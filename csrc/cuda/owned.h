// What CUDA hands out, given back when its owner goes. A child that a fork made gives nothing back:
// it is the parent's.
#pragma once

#include <sys/types.h>
#include <unistd.h>

#include <cstddef>
#include <memory>

#include <cuda_runtime_api.h>

#include "cuda/runtime.h"

namespace qlora::cuda {

template <auto give_back>
struct GiveBack {
  pid_t owner = getpid();

  template <typename T>
  void operator()(T* handle) const {
    if (getpid() != owner) return;
    const RelaxedCapture relaxed;  // Python collects garbage at any time, also during a capture
    give_back(handle);
  }
};

using OwnedStream = std::unique_ptr<CUstream_st, GiveBack<cudaStreamDestroy>>;
using OwnedEvent = std::unique_ptr<CUevent_st, GiveBack<cudaEventDestroy>>;
/// Of cudaMalloc or cudaMallocManaged.
using OwnedMemory = std::unique_ptr<std::byte, GiveBack<cudaFree>>;
using OwnedPinnedMemory = std::unique_ptr<std::byte, GiveBack<cudaFreeHost>>;

/// A stream that does not wait for the default stream, nor makes it wait.
inline OwnedStream make_stream(const char* operation) {
  cudaStream_t stream = nullptr;
  check_cuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), operation);
  return OwnedStream(stream);
}

/// An event for order alone: one that keeps the time costs more.
inline OwnedEvent make_event(const char* operation) {
  cudaEvent_t event = nullptr;
  check_cuda(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), operation);
  return OwnedEvent(event);
}

}  // namespace qlora::cuda
