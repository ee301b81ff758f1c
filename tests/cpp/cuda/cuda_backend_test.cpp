// How the CUDA backend treats the device: which one, its streams, memory, captures and errors, and
// what it demands of its arguments. (Shown with the codec's operations.)
#include "core/backend.h"
#include "cuda/runtime.h"
#include "cuda/support.h"
#include "support/expect_error.h"

namespace qlora {
namespace {

using cuda::DeviceTraits;

/// A valid weight and its dense tensor on the device. A test spoils the device or an argument.
class CudaDevice : public CudaEmulation {
 protected:
  Generator generator{14};
  HostTensor w_memory = HostTensor::random(DType::bfloat16, {64, 64}, generator);
  StoredWeight stored{64, 64, 64, true}, plain_stored{64, 64, 64, false};
  TensorView w = on_cuda(w_memory.view());
  NF4Weight weight = on_cuda(stored.view()), plain = on_cuda(plain_stored.view());

  void quantize() { nf4_quantize(w, weight, {}); }
  void dequantize() { nf4_dequantize(weight, w, {}); }
};

TEST_F(CudaDevice, QuantizeWaitsOnceAndDequantizeNever) {
  quantize();
  EXPECT_EQ(emulator::device().synchronize_count, 1);
  dequantize();
  EXPECT_EQ(emulator::device().synchronize_count, 1);
}

TEST_F(CudaDevice, WorkIsQueuedOnTheCallersStream) {
  int memory = 0;
  nf4_quantize(w, weight, {.stream = &memory});
  EXPECT_EQ(static_cast<void*>(emulator::device().stream), &memory);
  nf4_dequantize(weight, w, {});
  EXPECT_EQ(emulator::device().stream, nullptr);
}

TEST_F(CudaDevice, TheCallersDeviceIsCurrentAgainAfterwards) {
  emulator::device().current = 2;
  quantize();
  dequantize();
  EXPECT_EQ(emulator::device().current, 2);
  emulator::device().launch_error = cudaErrorIllegalAddress;
  EXPECT_THROW(quantize(), CudaError);
  EXPECT_EQ(emulator::device().current, 2);
}

TEST_F(CudaDevice, ADeviceThatTheProcessDoesNotUseGetsNoContext) {
  emulator::device().current = 2;
  emulator::device().without_context = {2, 3};
  quantize();
  EXPECT_EQ(emulator::device().without_context, (std::set<int>{2, 3}));
  EXPECT_EQ(emulator::device().current, 0);
}

TEST_F(CudaDevice, EachDeviceHasOnePoolThatKeepsALittle) {
  constexpr std::uint64_t kept = 64 << 20;
  for (const int device : {0, 13}) {
    emulator::device().current = device;
    for (int i = 0; i < 2; ++i) {
      const cuda::StreamBuffer buffer(1, nullptr, "test");
      EXPECT_EQ(emulator::kept_bytes_of_pools(device), kept);
    }
  }
}

TEST_F(CudaDevice, APoolIsMadeWhileAGraphIsRecorded) {
  emulator::device().current = 14;
  emulator::device().is_capturing = true;
  const cuda::StreamBuffer buffer(1, nullptr, "test");
  EXPECT_GT(emulator::kept_bytes_of_pools(14), 0u);
  EXPECT_EQ(emulator::device().broken_captures, 0);
  EXPECT_EQ(emulator::device().capture_mode, cudaStreamCaptureModeGlobal);
}

TEST_F(CudaDevice, AKernelAsksForSharedMemoryOnceADevice) {
  const int kernel = 0;  // its address stands for one
  const auto attributes_after = [&](int device, int bytes) {
    emulator::device().current = device;
    cuda::allow_shared_bytes(&kernel, bytes, "test", nullptr);
    EXPECT_GE(emulator::allowed_shared_bytes(&kernel), static_cast<std::size_t>(bytes));
    return emulator::device().attribute_count;
  };
  EXPECT_EQ(attributes_after(0, 60000), 1);
  EXPECT_EQ(attributes_after(0, 60000), 1);
  EXPECT_EQ(attributes_after(0, 50000), 1);
  EXPECT_EQ(attributes_after(0, 70000), 2);
  EXPECT_EQ(attributes_after(1, 50000), 3);
  for (int i = 0; i < 2; ++i) EXPECT_THROW(attributes_after(0, 1 << 20), CudaError);
  EXPECT_EQ(attributes_after(0, 70000), 5);  // what failed is not kept
}

TEST_F(CudaDevice, WithoutMemoryPoolsScratchMemoryIsTakenTheOldWay) {
  emulator::device().has_memory_pools = false;
  quantize();
}

TEST_F(CudaDevice, AnOldDeviceIsUnsupported) {
  emulator::device().major = 7;
  emulator::device().minor = 5;
  const NF4Weight on_old = on_cuda(stored.view(), 9);
  const TensorView out = on_cuda(w_memory.view(), 9);
  for (int i = 0; i < 2; ++i) {
    expect_error<Unsupported>(
        "nf4_dequantize: cuda:9 has compute capability 7.5, want 8.0 or newer",
        [&] { nf4_dequantize(on_old, out, {}); });
  }
}

TEST_F(CudaDevice, TraitsAreAskedForOnce) {
  emulator::device().major = 10;
  const DeviceTraits& traits = cuda::device_traits(10, "test");
  EXPECT_EQ(traits.compute_capability, 100);
  EXPECT_EQ(traits.multiprocessor_count, 132);
  EXPECT_EQ(traits.max_shared_bytes, 227 * 1024);
  EXPECT_EQ(traits.l2_bytes, 50 << 20);
  emulator::device().major = 12;
  EXPECT_EQ(&cuda::device_traits(10, "test"), &traits);
  EXPECT_EQ(cuda::device_traits(11, "test").compute_capability, 120);
}

TEST_F(CudaDevice, AFailureToLearnTraitsIsNotKept) {
  emulator::device().driver_error = cudaErrorNoDevice;
  expect_error<Unsupported>("test: no CUDA device is visible",
                            [] { cuda::device_traits(12, "test"); });
  emulator::device().driver_error = cudaSuccess;
  EXPECT_EQ(cuda::device_traits(12, "test").compute_capability, 90);
}

TEST_F(CudaDevice, AnIndexThatNoDeviceHasIsInvalid) {
  for (const int index : {-1, 64}) {
    expect_invalid(message("test: the device is cuda:", index, ", want an index from 0 to 63"),
                   [&] { cuda::device_traits(index, "test"); });
  }
}

TEST_F(CudaDevice, NoDriverIsUnsupported) {
  emulator::device().driver_error = cudaErrorInsufficientDriver;
  emulator::device().driver_version = 0;
  expect_error<Unsupported>(
      "nf4_dequantize: no NVIDIA driver was found; this build needs one for CUDA 13.0",
      [&] { dequantize(); });
}

TEST_F(CudaDevice, AnOldDriverIsUnsupported) {
  emulator::device().driver_error = cudaErrorInsufficientDriver;
  emulator::device().driver_version = 12040;
  expect_error<Unsupported>(
      "nf4_quantize: the NVIDIA driver is for CUDA 12.4, this build needs one for CUDA 13.0; "
      "update the driver, or rebuild with an older toolkit (12.8 or newer)",
      [&] { quantize(); });
}

TEST_F(CudaDevice, ADeviceThatTheBuildHasNoCodeForIsUnsupported) {
  emulator::device().launch_error = cudaErrorNoKernelImageForDevice;
  EXPECT_THROW(dequantize(), Unsupported);
}

TEST_F(CudaDevice, MemoryThatRunsOutIsOutOfMemory) {
  emulator::device().is_out_of_memory = true;
  expect_error<OutOfMemory>(
      "nf4_quantize: 280 bytes of scratch memory: cudaErrorMemoryAllocation: "
      "as the emulator was told",
      [&] { quantize(); });
}

TEST_F(CudaDevice, MemoryThatRunsOutAtALaunchDoesNotPromiseThatNothingIsQueued) {
  emulator::device().launch_error = cudaErrorMemoryAllocation;
  expect_error<CudaError>(
      "nf4_dequantize: no device memory is left to load a kernel: cudaErrorMemoryAllocation",
      [&] { dequantize(); });
}

TEST_F(CudaDevice, AFailedLaunchFreesTheScratchMemory) {
  emulator::device().launch_error = cudaErrorIllegalAddress;
  expect_error<CudaError>("nf4_quantize: cudaErrorIllegalAddress: as the emulator was told",
                          [&] { quantize(); });
}

TEST_F(CudaDevice, QuantizeRefusesAStreamThatRecordsAGraph) {
  emulator::device().is_capturing = true;
  expect_error<Unsupported>(
      "nf4_quantize: the stream records a CUDA graph, but this operation waits for its stream; "
      "call it before the capture",
      [&] { quantize(); });
  dequantize();
}

TEST_F(CudaDevice, ScalesThatAreNotAlignedAreRefusedByName) {
  const auto shift = [](TensorView& view, int bytes) {
    view.data = static_cast<std::uint8_t*>(view.data) + bytes;
  };
  shift(weight.nested_offset, 1);
  expect_error<InvalidArgument>(
      "nf4_dequantize: nested_offset holds fp32 scales, but its memory begins 1 bytes past a "
      "multiple of 4; pass nested_offset.clone()",
      [&] { dequantize(); });
  shift(weight.nested_offset, -1);
  shift(weight.nested_absmax, 2);
  EXPECT_THROW(quantize(), InvalidArgument);
  shift(weight.nested_absmax, -2);
  shift(weight.absmax, 1);  // bytes when nested: any address will do
  shift(plain.absmax, 1);
  EXPECT_THROW(nf4_dequantize(plain, w, {}), InvalidArgument);
}

TEST(CudaInfo, SaysWhatWasCompiled) {
  EXPECT_TRUE(cuda_info().is_compiled);
  EXPECT_EQ(cuda_info().architectures, "emulated");
  EXPECT_EQ(cuda_info().compiler, "host");
}

}  // namespace
}  // namespace qlora
