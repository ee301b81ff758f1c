#include "cuda/runtime.h"

#include <array>
#include <atomic>
#include <memory>

#include "core/backend.h"

namespace qlora::cuda {
namespace {

/// "13.0" for 13000.
std::string version_text(int version) { return message(version / 1000, ".", version % 1000 / 10); }

std::string describe_driver() {
  int driver = 0, runtime = 0;
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  if (driver == 0) {
    return message("no NVIDIA driver was found; this build needs one for CUDA ",
                   version_text(runtime));
  }
  return message("the NVIDIA driver is for CUDA ", version_text(driver),
                 ", this build needs one for CUDA ", version_text(runtime),
                 "; update the driver, or rebuild with an older toolkit (12.8 or newer)");
}

int attribute(cudaDeviceAttr which, int device, const char* operation) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, which, device), operation);
  return value;
}

constexpr int oldest_compute_capability = 80;  // bf16 in tensor cores, cp.async

DeviceTraits ask_for_traits(int device, const char* operation) {
  const auto ask = [&](cudaDeviceAttr which) { return attribute(which, device, operation); };
  const DeviceTraits traits{.compute_capability = 10 * ask(cudaDevAttrComputeCapabilityMajor) +
                                                  ask(cudaDevAttrComputeCapabilityMinor),
                            .multiprocessor_count = ask(cudaDevAttrMultiProcessorCount),
                            .max_shared_bytes = ask(cudaDevAttrMaxSharedMemoryPerBlockOptin),
                            .l2_bytes = ask(cudaDevAttrL2CacheSize)};
  if (traits.compute_capability < oldest_compute_capability) {
    throw Unsupported(message(operation, ": ", Device{DeviceType::cuda, device},
                              " has compute capability ", traits.compute_capability / 10, ".",
                              traits.compute_capability % 10, ", want 8.0 or newer"));
  }
  return traits;
}

}  // namespace

void throw_cuda_error(cudaError_t error, const char* what) {
  cudaGetLastError();  // or the next one to ask, perhaps torch, would be told of this error
  const std::string reason =
      message(what, ": ", cudaGetErrorName(error), ": ", cudaGetErrorString(error));
  switch (error) {
    case cudaErrorMemoryAllocation: throw OutOfMemory(reason);
    case cudaErrorInsufficientDriver:
    case cudaErrorStubLibrary:
    case cudaErrorSystemDriverMismatch:
    case cudaErrorCompatNotSupportedOnDevice:
      throw Unsupported(message(what, ": ", describe_driver()));
    case cudaErrorNoDevice: throw Unsupported(message(what, ": no CUDA device is visible"));
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction:
    case cudaErrorInvalidKernelImage:
    case cudaErrorSymbolNotFound:
    case cudaErrorInvalidPtx:
    case cudaErrorJitCompilerNotFound:
    case cudaErrorJitCompilationDisabled:
    case cudaErrorUnsupportedPtxVersion:
      throw Unsupported(message(reason, "; this build has code for ", cuda_info().architectures,
                                ", rebuild with QLORA_CUDA_ARCHS set to your device's"));
    case cudaErrorInitializationError:
      throw CudaError(message(reason,
                              "; a forked child cannot use CUDA once its parent has: start it by "
                              "spawn"));
    default: throw CudaError(reason);
  }
}

void check_driver(int version, const char* operation, const char* reason) {
  int driver = 0;
  check_cuda(cudaDriverGetVersion(&driver), operation);
  if (driver >= version) return;
  throw Unsupported(message(operation, ": the NVIDIA driver is for CUDA ", version_text(driver),
                            ", want ", version_text(version), " or newer: ", reason));
}

void throw_launch_error(cudaError_t error, const char* operation, cudaStream_t stream) {
  cudaGetLastError();
  check_stream(stream, operation);
  throw_cuda_error(error, operation);
}

void check_stream(cudaStream_t stream, const char* operation) {
  // The default streams are those of the current device, whichever it is.
  if (stream == nullptr || stream == cudaStreamLegacy || stream == cudaStreamPerThread) return;
  int device = 0, current = 0;
  if (cudaStreamGetDevice(stream, &device) != cudaSuccess ||
      cudaGetDevice(&current) != cudaSuccess) {
    cudaGetLastError();  // a driver older than CUDA 12.8 cannot say
    return;
  }
  check(device == current, operation, ": the stream belongs to cuda:", device,
        ", but the memory is ", "on cuda:", current);
}

const DeviceTraits& device_traits(int device, const char* operation) {
  constexpr int max_devices = 64;  // torch's own limit is 16, or 64 in a build for more
  check(device >= 0 && device < max_devices, operation, ": the device is cuda:", device,
        ", want an index from 0 to ", max_devices - 1);
  static std::array<std::atomic<const DeviceTraits*>, max_devices> known{};
  std::atomic<const DeviceTraits*>& slot = known[static_cast<std::size_t>(device)];
  if (const DeviceTraits* traits = slot.load(std::memory_order_acquire)) return *traits;
  auto asked = std::make_unique<const DeviceTraits>(ask_for_traits(device, operation));
  const DeviceTraits* first = nullptr;
  if (slot.compare_exchange_strong(first, asked.get(), std::memory_order_acq_rel)) {
    first = asked.release();
  }
  return *first;
}

DeviceGuard::DeviceGuard(Device device, const char* operation) : current_(device.index) {
  check_cuda(cudaGetDevice(&previous_), operation);
  device_traits(current_, operation);
  if (current_ != previous_) check_cuda(cudaSetDevice(current_), operation);
}

DeviceGuard::~DeviceGuard() {
  if (current_ != previous_) cudaSetDevice(previous_);
}

StreamBuffer::StreamBuffer(std::size_t bytes, cudaStream_t stream, const char* operation)
    : stream_(stream) {
  int device = 0;
  check_cuda(cudaGetDevice(&device), operation);
  is_pooled_ = attribute(cudaDevAttrMemoryPoolsSupported, device, operation) != 0;
  const std::string what = message(operation, ": ", bytes, " bytes of scratch memory");
  check_cuda(is_pooled_ ? cudaMallocAsync(&data_, bytes, stream) : cudaMalloc(&data_, bytes),
             what.c_str());
}

StreamBuffer::~StreamBuffer() { is_pooled_ ? cudaFreeAsync(data_, stream_) : cudaFree(data_); }

void refuse_capture(cudaStream_t stream, const char* operation, const char* reason) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check_cuda(cudaStreamIsCapturing(stream, &status), operation);
  if (status != cudaStreamCaptureStatusNone) {
    throw Unsupported(message(operation, ": the stream records a CUDA graph, but ", reason));
  }
}

}  // namespace qlora::cuda
