// The CUDA backend on the emulated device (emulation/emulator.h) gives the CPU's bits, and treats
// the device with care.
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include "core/backend.h"
#include "cuda/emulation/emulator.h"
#include "cuda/runtime.h"
#include "format/nf4_layout.h"
#include "support/expect_error.h"
#include "support/stored_weight.h"

namespace qlora {
namespace {

using cuda::DeviceTraits;
using emulator::Order;

constexpr std::int64_t block_sizes[] = {32, 64, 128, 256, 512, 1024, 2048, 4096};

TensorView on_cuda(TensorView view, int index = 0) {
  view.device = {DeviceType::cuda, index};
  return view;
}

NF4Weight on_cuda(NF4Weight weight, int index = 0) {
  for (TensorView* view :
       {&weight.codes, &weight.absmax, &weight.nested_absmax, &weight.nested_offset}) {
    *view = on_cuda(*view, index);
  }
  return weight;
}

/// The bytes of a tensor moved to an address `offset` bytes past a multiple of 16; written back
/// when it goes.
class Shifted {
 public:
  Shifted(HostTensor& tensor, std::size_t offset) : tensor_(tensor), offset_(offset) {
    memory_.resize(offset + tensor.bytes().size());
    std::copy(tensor.bytes().begin(), tensor.bytes().end(), address());
  }
  ~Shifted() { std::copy_n(address(), tensor_.bytes().size(), tensor_.bytes().begin()); }
  Shifted(const Shifted&) = delete;
  Shifted& operator=(const Shifted&) = delete;

  TensorView view() {
    TensorView view = on_cuda(tensor_.view());
    view.data = address();
    return view;
  }

 private:
  std::uint8_t* address() { return memory_.data() + offset_; }

  HostTensor& tensor_;
  std::size_t offset_;
  std::vector<std::uint8_t> memory_;
};

void expect_same_bytes(const StoredWeight& actual, const StoredWeight& expected) {
  EXPECT_EQ(actual.codes.bytes(), expected.codes.bytes());
  EXPECT_EQ(actual.absmax.bytes(), expected.absmax.bytes());
  EXPECT_EQ(actual.nested_absmax.bytes(), expected.nested_absmax.bytes());
  EXPECT_EQ(actual.nested_offset.bytes(), expected.nested_offset.bytes());
}

/// Normal numbers, with stretches of zeros, of subnormals (whose reciprocal overflows), of huge
/// numbers, and of ties.
HostTensor make_input(DType dtype, std::int64_t n, std::int64_t k, Generator& generator) {
  HostTensor w = HostTensor::random(dtype, {n, k}, generator, 0.02);
  const auto each = [&](std::int64_t begin, std::int64_t end, auto&& value) {
    for (std::int64_t i = begin; i < std::min(end, n * k); ++i) w.set(i, value(i));
  };
  const double tiny = dtype == DType::float16 ? 0x1p-24 : 0x1p-133;
  const double huge = dtype == DType::float16 ? 0x1p15 : 0x1p127;
  each(64, 192, [](std::int64_t) { return 0.0; });
  each(256, 320, [&](std::int64_t i) { return tiny * static_cast<double>(i % 7 - 3); });
  each(320, 384, [](std::int64_t i) { return i % 2 ? 0.0 : -0.0; });
  each(384, 448, [&](std::int64_t i) { return huge * std::sin(static_cast<double>(i)); });
  each(512, 576, [](std::int64_t i) {
    return i % 32 == 0 ? 1.0 : static_cast<double>(nf4_threshold(static_cast<int>(i % 15)));
  });
  each(4096, 4104, [&](std::int64_t) { return tiny; });
  return w;
}

class CudaEmulation : public testing::Test {
 protected:
  void SetUp() override { emulator::device() = {}; }
  void TearDown() override { EXPECT_EQ(emulator::device().live_allocations, 0); }
};

class CudaCodec : public CudaEmulation,
                  public testing::WithParamInterface<std::tuple<DType, bool>> {
 protected:
  const DType dtype = std::get<0>(GetParam());
  const bool is_nested = std::get<1>(GetParam());
  Generator generator{11};

  void expect_quantize_agrees(std::int64_t n, std::int64_t k, std::int64_t block_size) {
    SCOPED_TRACE(message("[", n, ", ", k, "], block_size ", block_size));
    HostTensor w = make_input(dtype, n, k, generator);
    StoredWeight expected(n, k, block_size, is_nested), actual(n, k, block_size, is_nested);
    nf4_quantize(w.view(), expected.view(), {});
    nf4_quantize(on_cuda(w.view()), on_cuda(actual.view()), {});
    expect_same_bytes(actual, expected);
  }

  void expect_dequantize_agrees(StoredWeight weight) {
    SCOPED_TRACE(message("[", weight.n, ", ", weight.k, "], block_size ", weight.block_size));
    HostTensor expected(dtype, {weight.n, weight.k}), actual(dtype, {weight.n, weight.k});
    nf4_dequantize(weight.view(), expected.view(), {});
    nf4_dequantize(on_cuda(weight.view()), on_cuda(actual.view()), {});
    EXPECT_EQ(actual.bytes(), expected.bytes());
  }
};

TEST_P(CudaCodec, QuantizesToTheCpuBits) {
  for (const std::int64_t block_size : block_sizes) {
    for (const auto& [n, k] : {std::pair<std::int64_t, std::int64_t>{1, 1},
                               {1, 2},
                               {3, 11},
                               {5, 13},
                               {16, 64},
                               {51, 167},
                               {3, 4096}}) {
      expect_quantize_agrees(n, k, block_size);
    }
  }
}

TEST_P(CudaCodec, QuantizesToTheCpuBitsInEveryOrderOfTheThreads) {
  emulator::device().max_thread_blocks = 1;  // the grid's loops run
  for (const Order order : {Order::ascending, Order::descending, Order::shuffled}) {
    emulator::device().order = order;
    expect_quantize_agrees(101, 167, 32);
    expect_quantize_agrees(101, 167, 256);
    expect_quantize_agrees(101, 1670, 4096);
  }
}

TEST_P(CudaCodec, QuantizesTensorsThatAreNotAligned) {
  const std::size_t element = dtype == DType::float32 ? 4 : 2;
  for (const std::int64_t block_size : {64, 1024}) {
    HostTensor w = make_input(dtype, 51, 167, generator);
    StoredWeight expected(51, 167, block_size, is_nested);
    nf4_quantize(w.view(), expected.view(), {});
    for (const auto& [w_offset, codes_offset] :
         {std::pair<std::size_t, std::size_t>{element, 0}, {0, 1}, {element, 3}, {0, 2}}) {
      StoredWeight actual(51, 167, block_size, is_nested);
      {
        Shifted shifted_w(w, w_offset), shifted_codes(actual.codes, codes_offset);
        NF4Weight out = on_cuda(actual.view());
        out.codes = shifted_codes.view();
        nf4_quantize(shifted_w.view(), out, {});
      }
      expect_same_bytes(actual, expected);
    }
  }
}

TEST_P(CudaCodec, DequantizesToTheCpuBits) {
  for (const std::int64_t block_size : block_sizes) {
    for (const auto& [n, k] : {std::pair<std::int64_t, std::int64_t>{1, 1},
                               {1, 2},
                               {3, 11},
                               {5, 13},
                               {16, 64},
                               {51, 167},
                               {3, 4096}}) {
      expect_dequantize_agrees(StoredWeight::random(n, k, block_size, is_nested, generator));
    }
  }
}

TEST_P(CudaCodec, DequantizesToTheCpuBitsInEveryOrderOfTheThreads) {
  emulator::device().max_thread_blocks = 1;
  for (const Order order : {Order::ascending, Order::descending, Order::shuffled}) {
    emulator::device().order = order;
    expect_dequantize_agrees(StoredWeight::random(101, 167, 32, is_nested, generator));
  }
}

TEST_P(CudaCodec, DequantizesScalesOfEverySize) {
  StoredWeight weight = StoredWeight::random(8, 1024, 32, is_nested, generator);
  const double extremes[] = {0.0, 0x1p-149, 0x1p-133, 0x1p-24, 65519.0, 65520.0, 0x1.fep127};
  HostTensor& scales = is_nested ? weight.nested_offset : weight.absmax;
  for (const double extreme : extremes) {
    store_floats(scales, std::vector<double>(scales.bytes().size() / 4, extreme));
    expect_dequantize_agrees(weight);
  }
}

TEST_P(CudaCodec, DequantizesTensorsThatAreNotAligned) {
  const std::size_t element = dtype == DType::float32 ? 4 : 2;
  StoredWeight weight = StoredWeight::random(51, 167, 64, is_nested, generator);
  HostTensor expected(dtype, {51, 167});
  nf4_dequantize(weight.view(), expected.view(), {});
  for (const auto& [out_offset, codes_offset] :
       {std::pair<std::size_t, std::size_t>{element, 0}, {0, 1}, {element, 3}, {0, 2}}) {
    HostTensor actual(dtype, {51, 167});
    {
      Shifted shifted_out(actual, out_offset), shifted_codes(weight.codes, codes_offset);
      NF4Weight shifted_weight = on_cuda(weight.view());
      shifted_weight.codes = shifted_codes.view();
      nf4_dequantize(shifted_weight, shifted_out.view(), {});
    }
    EXPECT_EQ(actual.bytes(), expected.bytes());
  }
}

INSTANTIATE_TEST_SUITE_P(All, CudaCodec, testing::Combine(float_dtypes, testing::Bool()),
                         [](const auto& test) {
                           return std::string(name_of(std::get<0>(test.param))) +
                                  (std::get<1>(test.param) ? "Nested" : "Plain");
                         });

TEST_F(CudaEmulation, SumsManyScalesInTheCpuOrder) {
  Generator generator{15};
  constexpr std::int64_t n = 300, k = 1001;  // 37 runs of 256 blocks: more than a warp has lanes
  HostTensor w = HostTensor::random(DType::float32, {n, k}, generator);
  StoredWeight expected(n, k, 32, true), actual(n, k, 32, true);
  nf4_quantize(w.view(), expected.view(), {});
  nf4_quantize(on_cuda(w.view()), on_cuda(actual.view()), {});
  expect_same_bytes(actual, expected);
}

TEST_F(CudaEmulation, DequantizesAbsmaxToTheCpuBits) {
  Generator generator{12};
  for (const bool is_nested : {false, true}) {
    for (const std::int64_t k : {1, 32, 8191, 32 * 600}) {
      StoredWeight weight = StoredWeight::random(1, k, 32, is_nested, generator);
      HostTensor expected(DType::float32, {weight.block_count()}), actual = expected;
      nf4_dequantize_absmax(weight.view(), expected.view(), {});
      nf4_dequantize_absmax(on_cuda(weight.view()), on_cuda(actual.view()), {});
      EXPECT_EQ(actual.bytes(), expected.bytes());
    }
  }
}

TEST_F(CudaEmulation, ActsOnAnEmptyWeightAsTheCpuDoes) {
  HostTensor w(DType::float32, {0, 64}), scales(DType::float32, {0});
  for (const bool is_nested : {false, true}) {
    StoredWeight expected(0, 64, 64, is_nested), actual(0, 64, 64, is_nested);
    nf4_quantize(w.view(), expected.view(), {});
    nf4_quantize(on_cuda(w.view()), on_cuda(actual.view()), {});
    expect_same_bytes(actual, expected);
    nf4_dequantize(on_cuda(actual.view()), on_cuda(w.view()), {});
    nf4_dequantize_absmax(on_cuda(actual.view()), on_cuda(scales.view()), {});
  }
}

TEST_F(CudaEmulation, NamesTheFirstBlockThatHasANaNOrInf) {
  constexpr double nan = std::numeric_limits<double>::quiet_NaN();
  constexpr double inf = std::numeric_limits<double>::infinity();
  Generator generator{13};
  for (const DType dtype : {DType::float32, DType::bfloat16, DType::float16}) {
    for (const std::int64_t block_size : {32, 64, 4096}) {
      for (const double bad : {nan, inf, -inf}) {
        for (const std::int64_t where : {0, 777, 8516}) {
          HostTensor w = HostTensor::random(dtype, {51, 167}, generator);
          w.set(where, bad);
          w.set(8516, nan);
          StoredWeight out(51, 167, block_size, true);
          const std::int64_t block = where / block_size;
          expect_invalid(
              message("nf4_quantize: w has a NaN or Inf in block ", block, ", elements ",
                      block * block_size, " to ", std::min((block + 1) * block_size, w.numel()) - 1,
                      " of the flattened weight"),
              [&] { nf4_quantize(on_cuda(w.view()), on_cuda(out.view()), {}); });
        }
      }
    }
  }
}

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

TEST_F(CudaDevice, WhatTheBackendLacksIsUnsupportedByName) {
  HostTensor x(DType::bfloat16, {1, 64}), y(DType::bfloat16, {1, 64});
  try {
    nf4_linear(on_cuda(x.view()), weight, {}, on_cuda(y.view()), {});
    ADD_FAILURE() << "nothing was thrown";
  } catch (const Unsupported& error) {
    EXPECT_STREQ(error.what(), "nf4_linear: the CUDA backend does not have this operation yet");
  }
}

TEST(CudaInfo, SaysWhatWasCompiled) {
  EXPECT_TRUE(cuda_info().is_compiled);
  EXPECT_EQ(cuda_info().architectures, "emulated");
  EXPECT_EQ(cuda_info().compiler, "host");
}

}  // namespace
}  // namespace qlora
