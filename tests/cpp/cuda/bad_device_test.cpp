// What the CUDA backend says of drivers, devices, streams and addresses that it cannot use.
#include <utility>

#include "core/backend.h"
#include "cuda/emulation/emulator.h"
#include "cuda/emulation/streams.h"
#include "cuda/runtime.h"
#include "support/expect_error.h"
#include "support/stored_weight.h"

namespace qlora {
namespace {

using emulator::device;
using emulator::streams;

class CudaBadDevice : public testing::Test {
 protected:
  Generator generator{31};
  HostTensor memory = HostTensor::random(DType::bfloat16, {64, 64}, generator);
  StoredWeight stored{64, 64, 64, true};
  TensorView dense = memory.view();
  NF4Weight weight = stored.view();

  CudaBadDevice() {
    device() = {};
    streams() = {};
    for (TensorView* view :
         {&dense, &weight.codes, &weight.absmax, &weight.nested_absmax, &weight.nested_offset}) {
      view->device = {DeviceType::cuda, 0};
    }
  }

  void TearDown() override {
    EXPECT_EQ(device().live_allocations, 0);
    EXPECT_EQ(streams().live, 0);
    device() = {};
    streams() = {};
  }

  void dequantize(cudaStream_t stream) { nf4_dequantize(weight, dense, {.stream = stream}); }
};

TEST_F(CudaBadDevice, TheReportListsWhatIsUsable) {
  streams().device_count = 2;
  const CudaDeviceReport report = cuda_device_report();
  EXPECT_EQ(report.usable, (std::vector<std::string>{"cuda:0 Emulated, compute capability 9.0",
                                                     "cuda:1 Emulated, compute capability 9.0"}));
  EXPECT_TRUE(report.problems.empty());
}

void expect_problem(const std::string& problem) {
  const CudaDeviceReport report = cuda_device_report();
  EXPECT_TRUE(report.usable.empty());
  EXPECT_EQ(report.problems, std::vector<std::string>{problem});
}

TEST_F(CudaBadDevice, TheReportSaysWhyNothingIsUsable) {
  device().driver_error = cudaErrorNoDevice;
  expect_problem("CUDA: no CUDA device is visible");
  device().driver_error = cudaErrorInsufficientDriver;
  device().driver_version = 0;
  expect_problem("CUDA: no NVIDIA driver was found; this build needs one for CUDA 13.0");
  device().driver_version = 12040;
  expect_problem(
      "CUDA: the NVIDIA driver is for CUDA 12.4, this build needs one for CUDA 13.0; update the "
      "driver, or rebuild with an older toolkit (12.8 or newer)");
}

TEST_F(CudaBadDevice, AnErrorOfAForkedChildSaysWhatToDo) {
  device().driver_error = cudaErrorInitializationError;
  expect_problem(
      "CUDA: cudaError: as the emulator was told; a forked child cannot use CUDA once its parent "
      "has: start it by spawn");
}

TEST_F(CudaBadDevice, CodeThatTheDeviceCannotRunIsUnsupported) {
  for (const cudaError_t error : {cudaErrorNoKernelImageForDevice, cudaErrorInvalidDeviceFunction,
                                  cudaErrorInvalidKernelImage, cudaErrorSymbolNotFound,
                                  cudaErrorInvalidPtx, cudaErrorUnsupportedPtxVersion,
                                  cudaErrorJitCompilerNotFound, cudaErrorJitCompilationDisabled}) {
    device().launch_error = error;
    expect_error<Unsupported>(
        "nf4_dequantize: cudaError: as the emulator was told; this build has code for emulated, "
        "rebuild with QLORA_CUDA_ARCHS set to your device's",
        [&] { dequantize(nullptr); });
  }
}

/// A stream of device `index`.
class Stream {
 public:
  explicit Stream(int index) {
    const int current = std::exchange(device().current, index);
    cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking);
    device().current = current;
  }
  ~Stream() { cudaStreamDestroy(stream_); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  operator cudaStream_t() const { return stream_; }

 private:
  cudaStream_t stream_;
};

TEST_F(CudaBadDevice, AStreamOfAnotherDeviceIsInvalidAndBothAreNamed) {
  const Stream own(0), other(1);
  dequantize(own);
  const std::vector<std::uint8_t> before = memory.bytes();
  expect_invalid("nf4_dequantize: the stream belongs to cuda:1, but the memory is on cuda:0",
                 [&] { dequantize(other); });
  EXPECT_EQ(memory.bytes(), before);
  device().current = 1;  // what counts is where the tensors are
  dequantize(own);
  EXPECT_THROW(dequantize(other), InvalidArgument);
}

TEST_F(CudaBadDevice, CopiesAreNotQueuedOnAStreamOfAnotherDevice) {
  const Stream other(1);
  StoredWeight plain_stored(64, 64, 64, false);
  HostTensor absmax(DType::float32, {64});
  NF4Weight plain = plain_stored.view();
  TensorView out = absmax.view();
  for (TensorView* view : {&plain.codes, &plain.absmax, &out}) view->device = dense.device;
  const std::vector<std::uint8_t> before = absmax.bytes();
  expect_invalid("nf4_dequantize_absmax: the stream belongs to cuda:1, but the memory is on cuda:0",
                 [&] { nf4_dequantize_absmax(plain, out, {.stream = cudaStream_t{other}}); });
  EXPECT_EQ(absmax.bytes(), before);
  expect_invalid("nf4_quantize: the stream belongs to cuda:1, but the memory is on cuda:0",
                 [&] { nf4_quantize(dense, weight, {.stream = cudaStream_t{other}}); });
  EXPECT_TRUE(streams().queued.empty());
}

TEST_F(CudaBadDevice, AStreamOfAnotherDeviceIsAnErrorTooWhereTheDriverCannotNameIt) {
  streams().knows_device_of_stream = false;
  const Stream other(1);
  EXPECT_THROW(dequantize(other), CudaError);
  EXPECT_NO_THROW(cuda::check_stream(other, "test"));
}

TEST_F(CudaBadDevice, TheDefaultStreamsAreThoseOfEveryDevice) {
  device().current = 3;
  for (const cudaStream_t stream : {cudaStream_t{}, cudaStreamLegacy, cudaStreamPerThread}) {
    EXPECT_NO_THROW(cuda::check_stream(stream, "test"));
  }
}

TEST_F(CudaBadDevice, ATensorThatIsNotAlignedToItsElementsIsRefusedByName) {
  dense.data = static_cast<std::byte*>(dense.data) + 1;
  expect_invalid(
      "nf4_dequantize: out is bfloat16, but its memory begins 1 bytes past a multiple of 2; pass "
      "out.clone()",
      [&] { dequantize(nullptr); });
}

}  // namespace
}  // namespace qlora
