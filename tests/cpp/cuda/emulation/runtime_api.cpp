// The CUDA runtime's functions, on the emulated device.
#include <cstdlib>
#include <cstring>

#include "cuda/emulation/emulator.h"
#include "cuda/emulation/streams.h"

emulator::Device& emulator::device() {
  static Device the_device;
  return the_device;
}

using emulator::device;

cudaError_t cudaGetLastError() { return cudaSuccess; }

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
    case cudaErrorIllegalAddress: return "cudaErrorIllegalAddress";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorLaunchFailure: return "cudaErrorLaunchFailure";
    default: return "cudaError";
  }
}

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorLaunchFailure ? device().failure.c_str() : "as the emulator was told";
}

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
