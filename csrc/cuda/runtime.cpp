#include "cuda/runtime.h"

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

}  // namespace

void throw_cuda_error(cudaError_t error, const char* what) {
  cudaGetLastError();  // or the next one to ask, perhaps torch, would be told of this error
  const std::string reason =
      message(what, ": ", cudaGetErrorName(error), ": ", cudaGetErrorString(error));
  switch (error) {
    case cudaErrorMemoryAllocation: throw OutOfMemory(reason);
    case cudaErrorInsufficientDriver:
    case cudaErrorStubLibrary:
    case cudaErrorSystemDriverMismatch: throw Unsupported(message(what, ": ", describe_driver()));
    case cudaErrorNoDevice: throw Unsupported(message(what, ": no CUDA device is visible"));
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorUnsupportedPtxVersion:
      throw Unsupported(message(reason, "; this build has code for ", cuda_info().architectures,
                                ", rebuild with QLORA_CUDA_ARCHS set to your device's"));
    default: throw CudaError(reason);
  }
}

int multiprocessor_count(const char* operation) {
  int device = 0;
  check_cuda(cudaGetDevice(&device), operation);
  return attribute(cudaDevAttrMultiProcessorCount, device, operation);
}

DeviceGuard::DeviceGuard(Device device, const char* operation) : current_(device.index) {
  check_cuda(cudaGetDevice(&previous_), operation);
  const int major = attribute(cudaDevAttrComputeCapabilityMajor, current_, operation);
  if (major < 8) {
    throw Unsupported(message(operation, ": ", device, " has compute capability ", major, ".",
                              attribute(cudaDevAttrComputeCapabilityMinor, current_, operation),
                              ", want 8.0 or newer"));
  }
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

void refuse_capture(cudaStream_t stream, const char* operation) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check_cuda(cudaStreamIsCapturing(stream, &status), operation);
  if (status != cudaStreamCaptureStatusNone) {
    throw Unsupported(message(operation,
                              ": the stream records a CUDA graph, but this operation "
                              "waits for its stream; call it before the capture"));
  }
}

}  // namespace qlora::cuda
