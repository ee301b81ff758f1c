// The CUDA runtime's functions, on the emulated device.
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <set>
#include <string_view>
#include <utility>

#include <cuda.h>

#include "cuda/emulation/emulator.h"
#include "cuda/emulation/streams.h"

emulator::Device& emulator::device() {
  static Device the_device;
  return the_device;
}

using emulator::device;

struct CUmemPoolHandle_st {
  int device;
  std::uint64_t kept_bytes = 0;
};

namespace {

// What outlives a test: the backend makes a pool, asks for shared memory, and loads a kernel, once.
std::deque<CUmemPoolHandle_st> pools;
std::set<std::pair<int, const void*>> loaded_kernels;
std::map<std::pair<int, const void*>, std::size_t> shared_bytes_of;

cudaError_t allocate(void** memory, std::size_t bytes) {
  if (device().is_out_of_memory || emulator::is_to_fail() || !emulator::make_room(bytes)) {
    return cudaErrorMemoryAllocation;
  }
  const cudaError_t error = emulator::allocate_on_host(memory, bytes);
  if (error == cudaSuccess) emulator::note_on_device(*memory, bytes);
  return error;
}

void release(void* memory) {
  emulator::forget_memory(memory);
  std::free(memory);
  --device().live_allocations;
}

}  // namespace

cudaError_t emulator::allocate_on_host(void** memory, std::size_t bytes) {
  *memory = std::malloc(bytes);
  if (*memory == nullptr) return cudaErrorMemoryAllocation;
  std::memset(*memory, 0xa5, bytes);  // poison: nothing may rely on fresh memory
  ++device().live_allocations;
  return cudaSuccess;
}

void emulator::note_unsafe_call() {
  if (device().is_capturing && device().capture_mode != cudaStreamCaptureModeRelaxed) {
    ++device().broken_captures;
  }
}

std::size_t emulator::allowed_shared_bytes(const void* kernel) {
  return shared_bytes_of[{device().current, kernel}];
}

cudaError_t emulator::load(const void* kernel) {
  const std::pair here{device().current, kernel};
  if (loaded_kernels.contains(here)) return cudaSuccess;
  if (device().is_out_of_memory) return cudaErrorMemoryAllocation;
  loaded_kernels.insert(here);
  return cudaSuccess;
}

std::uint64_t emulator::kept_bytes_of_pools(int index) {
  std::uint64_t bytes = 0;
  for (const CUmemPoolHandle_st& pool : pools) {
    if (pool.device == index) bytes += pool.kept_bytes;
  }
  return bytes;
}

cudaError_t cudaGetLastError() { return cudaSuccess; }

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
    case cudaErrorNotReady: return "cudaErrorNotReady";
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
  device().without_context.erase(index);
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
  ++device().attribute_count;
  if (value > device().max_shared_bytes) return cudaErrorInvalidValue;
  shared_bytes_of[{device().current, kernel}] = static_cast<std::size_t>(value);
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel) {
  emulator::note_unsafe_call();
  *attributes = {};
  return emulator::load(kernel);
}

cudaError_t cudaMalloc(void** memory, std::size_t bytes) {
  emulator::note_unsafe_call();
  return allocate(memory, bytes);
}

cudaError_t cudaFree(void* memory) {
  emulator::note_unsafe_call();
  release(memory);
  return cudaSuccess;
}

cudaError_t cudaMemPoolCreate(cudaMemPool_t* pool, const cudaMemPoolProps* properties) {
  if (!device().has_memory_pools || properties->allocType != cudaMemAllocationTypePinned ||
      properties->location.type != cudaMemLocationTypeDevice) {
    return cudaErrorInvalidValue;
  }
  emulator::note_unsafe_call();
  *pool = &pools.emplace_back(CUmemPoolHandle_st{.device = properties->location.id});
  return cudaSuccess;
}

cudaError_t cudaMemPoolDestroy(cudaMemPool_t pool) {
  pool->kept_bytes = 0;
  return cudaSuccess;
}

cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t pool, cudaMemPoolAttr, void* value) {
  std::memcpy(&pool->kept_bytes, value, sizeof pool->kept_bytes);
  return cudaSuccess;
}

cudaError_t cudaMallocFromPoolAsync(void** memory, std::size_t bytes, cudaMemPool_t pool,
                                    cudaStream_t) {
  if (!device().has_memory_pools || pool->device != device().current) return cudaErrorInvalidValue;
  return allocate(memory, bytes);
}

cudaError_t cudaFreeAsync(void* memory, cudaStream_t stream) {
  emulator::when_reached(stream, [=] { release(memory); });
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* memory, int byte, std::size_t bytes, cudaStream_t stream) {
  if (emulator::is_to_fail()) return cudaErrorMemoryAllocation;
  emulator::queue_memset(memory, bytes, stream, [=] {
    if (bytes > 0) std::memset(memory, byte, bytes);
  });
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* destination, const void* source, std::size_t bytes,
                            cudaMemcpyKind kind, cudaStream_t stream) {
  emulator::queue_copy(kind, kind == cudaMemcpyHostToDevice ? source : destination, bytes, stream,
                       [=] {
                         if (bytes > 0) std::memcpy(destination, source, bytes);
                       });
  return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = device().is_capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, device().capture_mode);
  return cudaSuccess;
}

CUresult cuDevicePrimaryCtxGetState(CUdevice index, unsigned* flags, int* is_active) {
  *flags = 0;
  *is_active = !device().without_context.contains(index);
  return CUDA_SUCCESS;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** address, unsigned,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  const bool is_known = std::string_view(symbol) == "cuDevicePrimaryCtxGetState";
  *address = is_known ? reinterpret_cast<void*>(&cuDevicePrimaryCtxGetState) : nullptr;
  *result = is_known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  emulator::note_unsafe_call();
  ++device().synchronize_count;
  emulator::wait_for(stream);
  return device().failure.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}
