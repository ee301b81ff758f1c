// What every CUDA operation needs of the runtime: errors as exceptions, the right device, scratch
// memory, launches.
#pragma once

#include <cstddef>

#include <cuda_runtime_api.h>

#include "core/check.h"
#include "core/tensor_view.h"
#include "cuda/device_traits.h"

namespace qlora::cuda {

/// Throws what `error` means: OutOfMemory; Unsupported where driver, device and build do not fit
/// together; else CudaError.
[[noreturn]] void throw_cuda_error(cudaError_t error, const char* what);

/// Throws unless `error` is cudaSuccess. `what` names the operation or call, for the message.
inline void check_cuda(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw_cuda_error(error, what);
}

/// Throws what a failed launch on `stream` means. A launch refuses a stream of another device by
/// itself, so that nothing has to ask before; here that becomes an InvalidArgument with both names.
/// Memory that is missing for a kernel's code is a CudaError: OutOfMemory promises that nothing has
/// been queued, and a launch before this one may have been.
[[noreturn]] void throw_launch_error(cudaError_t error, const char* operation, cudaStream_t stream);

/// Lets `kernel` be launched with so much dynamic shared memory, more than 48 KB, on the current
/// device. A look-up, but for the first time; allowed while a CUDA graph is recorded.
void allow_shared_bytes(const void* kernel, int bytes, const char* operation, cudaStream_t stream);

/// Has the code of `kernel` on the current device, which its first launch would otherwise see to:
/// for want of memory a launch after this one does not fail. A look-up, but for the first time;
/// allowed while a CUDA graph is recorded.
void load_kernel(const void* kernel, const char* operation);

/// Throws InvalidArgument if `stream` belongs to another device than the current one. For work that
/// CUDA queues on any stream without a word, such as copies: a launch needs no check.
void check_stream(cudaStream_t stream, const char* operation);

/// What plans depend on of a device. It is asked for once, since it cannot change, and kept for the
/// life of the process: later calls cost a look-up. Any thread may call it.
///
/// Throws Unsupported without a usable driver or device, or for a device older than compute
/// capability 8.0.
const DeviceTraits& device_traits(int device, const char* operation);

/// Makes the operation's device the current one while it lives. Throws as device_traits.
///
/// Where the caller's device has no context the operation's stays current: to go back would make a
/// context there, some 500 MB on a device that the process does not use.
class DeviceGuard {
 public:
  DeviceGuard(Device device, const char* operation);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  int current_;
};

/// While it lives, calls of this thread that free, wait or allocate leave a CUDA graph alone that
/// somebody else records. Otherwise such a call fails, and with it the capture, in whatever thread
/// that is.
class RelaxedCapture {
 public:
  RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&other_); }
  ~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&other_); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  cudaStreamCaptureMode other_ = cudaStreamCaptureModeRelaxed;
};

/// Device memory that work queued on `stream` may use; what is queued after its end may not.
///
/// It comes from a memory pool of this library, one a device, so that neither taking nor returning
/// it waits for the device; while a CUDA graph is recorded, from the graph's own memory. Where the
/// device has no pools (some virtual GPUs) both wait.
///
/// An operation takes it before it queues anything: see OutOfMemory in core/operations.h.
class StreamBuffer {
 public:
  StreamBuffer(std::size_t bytes, cudaStream_t stream, const char* operation);
  ~StreamBuffer();
  StreamBuffer(const StreamBuffer&) = delete;
  StreamBuffer& operator=(const StreamBuffer&) = delete;

  std::byte* data() const { return static_cast<std::byte*>(data_); }

 private:
  void* data_ = nullptr;
  cudaStream_t stream_;
  bool is_pooled_;
};

/// Throws Unsupported unless the driver is for CUDA `version` (1000 * major + 10 * minor) or newer.
/// `reason` says what needs it.
void check_driver(int version, const char* operation, const char* reason);

bool is_capturing(cudaStream_t stream, const char* operation);

/// Throws Unsupported, for the given reason, while `stream` records a CUDA graph.
void refuse_capture(cudaStream_t stream, const char* operation,
                    const char* reason =
                        "this operation waits for its stream; call it before the "
                        "capture");

}  // namespace qlora::cuda
