// Requests to CUDA's unified memory, whose functions changed their arguments in CUDA 13.
#pragma once

#include <cstddef>

#include <cuda_runtime_api.h>

namespace qlora::cuda {

#if CUDART_VERSION >= 13000
using MemoryLocation = cudaMemLocation;
inline MemoryLocation device_location(int device) {
  return {.type = cudaMemLocationTypeDevice, .id = device};
}
inline MemoryLocation host_location() { return {.type = cudaMemLocationTypeHost, .id = 0}; }
#else
using MemoryLocation = int;
inline MemoryLocation device_location(int device) { return device; }
inline MemoryLocation host_location() { return cudaCpuDeviceId; }
#endif

/// Queues a move to `location`.
inline cudaError_t prefetch(const void* memory, std::size_t bytes, MemoryLocation location,
                            cudaStream_t stream) {
#if CUDART_VERSION >= 13000
  return cudaMemPrefetchAsync(memory, bytes, location, 0, stream);
#else
  return cudaMemPrefetchAsync(memory, bytes, location, stream);
#endif
}

inline cudaError_t advise(const void* memory, std::size_t bytes, cudaMemoryAdvise advice,
                          MemoryLocation location) {
  return cudaMemAdvise(memory, bytes, advice, location);
}

}  // namespace qlora::cuda
