#include "cuda/runtime.h"

#include <array>
#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <utility>

#include <cuda.h>

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

constexpr std::size_t max_devices = 64;  // torch's own limit is 16, or 64 in a build for more

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

/// Whether the process uses `device`, in which case it has a context there. True where the driver
/// cannot be asked. The driver's own functions are looked up: nothing links with its library, which
/// a machine without a GPU lacks.
bool has_context(int device) {
  using Ask = decltype(&cuDevicePrimaryCtxGetState);
  static const Ask ask = [] {
    constexpr unsigned cuda_version = 12000;
    void* address = nullptr;
    cudaDriverEntryPointQueryResult result{};
    const cudaError_t error = cudaGetDriverEntryPointByVersion(
        "cuDevicePrimaryCtxGetState", &address, cuda_version, cudaEnableDefault, &result);
    if (error == cudaSuccess && result == cudaDriverEntryPointSuccess) {
      return reinterpret_cast<Ask>(address);
    }
    cudaGetLastError();
    return Ask{};
  }();
  unsigned flags = 0;
  int is_active = 0;
  return ask == nullptr || ask(device, &flags, &is_active) != CUDA_SUCCESS || is_active != 0;
}

/// What a pool of scratch memory keeps when nobody uses it. Without it a synchronisation gives all
/// back, and the next step maps it again, some 100 us a time. The products' partial sums are the
/// largest scratch, a few tens of MiB for the layers of a 70B model. More would be memory that torch
/// does not see and cannot reclaim.
constexpr std::uint64_t kept_scratch_bytes = std::uint64_t{64} << 20;

cudaMemPool_t make_scratch_pool(int device, const char* operation) {
  const RelaxedCapture relaxed;  // the pool is to outlive the graph that is being recorded
  cudaMemPoolProps properties{};
  properties.allocType = cudaMemAllocationTypePinned;  // the one type that there is
  properties.location.type = cudaMemLocationTypeDevice;
  properties.location.id = device;
  cudaMemPool_t pool = nullptr;
  check_cuda(cudaMemPoolCreate(&pool, &properties), operation);
  std::uint64_t kept = kept_scratch_bytes;
  const cudaError_t error = cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &kept);
  if (error != cudaSuccess) {
    cudaMemPoolDestroy(pool);
    throw_cuda_error(error, operation);
  }
  return pool;
}

/// The pool of a device, made when it is first asked for. It is never destroyed: at the process's
/// end the driver may have gone before. The device's default pool, which others use, is left as it
/// is.
cudaMemPool_t scratch_pool(int device, const char* operation) {
  struct Slot {
    std::once_flag once;
    cudaMemPool_t pool = nullptr;
  };
  static std::array<Slot, max_devices> slots;
  Slot& slot = slots.at(static_cast<std::size_t>(device));
  std::call_once(slot.once, [&] { slot.pool = make_scratch_pool(device, operation); });
  return slot.pool;
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
  if (error == cudaErrorMemoryAllocation) {
    throw CudaError(message(
        operation, ": no device memory is left to load a kernel: ", cudaGetErrorName(error)));
  }
  throw_cuda_error(error, operation);
}

void allow_shared_bytes(const void* kernel, int bytes, const char* operation, cudaStream_t stream) {
  static std::mutex mutex;
  // By device and kernel. Not destroyed: a thread may launch while the process ends.
  static auto& allowed = *new std::map<std::pair<int, const void*>, int>;
  int device = 0;
  check_cuda(cudaGetDevice(&device), operation);
  const std::lock_guard lock(mutex);
  int& known = allowed[{device, kernel}];
  if (known >= bytes) return;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) throw_launch_error(error, operation, stream);
  known = bytes;
}

void load_kernel(const void* kernel, const char* operation) {
  static std::mutex mutex;
  static auto& loaded = *new std::set<std::pair<int, const void*>>;  // as `allowed` above
  int device = 0;
  check_cuda(cudaGetDevice(&device), operation);
  const std::lock_guard lock(mutex);
  if (loaded.contains({device, kernel})) return;
  const RelaxedCapture relaxed;
  cudaFuncAttributes attributes{};  // to ask for them loads the kernel
  check_cuda(cudaFuncGetAttributes(&attributes, kernel),
             message(operation, ": loading a kernel").c_str());
  loaded.emplace(device, kernel);
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
  check(device >= 0 && device < static_cast<int>(max_devices), operation,
        ": the device is cuda:", device, ", want an index from 0 to ", max_devices - 1);
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
  if (current_ != previous_ && has_context(previous_)) cudaSetDevice(previous_);
}

StreamBuffer::StreamBuffer(std::size_t bytes, cudaStream_t stream, const char* operation)
    : stream_(stream) {
  int device = 0;
  check_cuda(cudaGetDevice(&device), operation);
  is_pooled_ = attribute(cudaDevAttrMemoryPoolsSupported, device, operation) != 0;
  const std::string what = message(operation, ": ", bytes, " bytes of scratch memory");
  check_cuda(is_pooled_
                 ? cudaMallocFromPoolAsync(&data_, bytes, scratch_pool(device, operation), stream)
                 : cudaMalloc(&data_, bytes),
             what.c_str());
}

StreamBuffer::~StreamBuffer() {
  const cudaError_t error = is_pooled_ ? cudaFreeAsync(data_, stream_) : cudaFree(data_);
  if (error != cudaSuccess) cudaGetLastError();  // or the next call would be told of it
}

bool is_capturing(cudaStream_t stream, const char* operation) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check_cuda(cudaStreamIsCapturing(stream, &status), operation);
  return status != cudaStreamCaptureStatusNone;
}

void refuse_capture(cudaStream_t stream, const char* operation, const char* reason) {
  if (is_capturing(stream, operation)) {
    throw Unsupported(message(operation, ": the stream records a CUDA graph, but ", reason));
  }
}

}  // namespace qlora::cuda
