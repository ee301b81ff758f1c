// Dropout on the emulated device gives the CPU's bits.
#include <cmath>

#include "core/operations.h"
#include "cuda/support.h"

namespace qlora {
namespace {

class CudaDropout : public CudaEmulation, public testing::WithParamInterface<DType> {
 protected:
  const DType dtype = GetParam();
  Generator generator{15};

  HostTensor seed_tensor(std::int64_t seed) {
    HostTensor tensor(DType::int64, {1});
    std::memcpy(tensor.bytes().data(), &seed, sizeof seed);
    return tensor;
  }

  HostTensor input(std::int64_t count) {
    HostTensor x = HostTensor::random(dtype, {count}, generator);
    if (count > 300) {
      x.set(5, -0.0);
      x.set(6, HUGE_VAL);
      x.set(300, dtype == DType::float16 ? 65504.0 : 0x1.fep127);  // overflows where it is kept
      x.set(299, dtype == DType::float16 ? 0x1p-24 : 0x1p-133);
    }
    return x;
  }

  HostTensor on_cpu(HostTensor x, double p, std::int64_t seed_value) {
    HostTensor seed = seed_tensor(seed_value), out(dtype, {x.numel()});
    dropout(x.view(), p, seed.view(), out.view(), {});
    return out;
  }
};

TEST_P(CudaDropout, GivesTheCpuBits) {
  for (const std::int64_t count : {0, 1, 3, 4, 5, 7, 8, 9, 1023, 2048, 5003}) {
    for (const double p : {0.0, 1e-9, 0.3, 0.999999}) {
      SCOPED_TRACE(message(count, " elements, p = ", p));
      HostTensor x = input(count), seed = seed_tensor(0x123456789abcdef), out(dtype, {count});
      dropout(on_cuda(x.view()), p, on_cuda(seed.view()), on_cuda(out.view()), {});
      EXPECT_EQ(out.bytes(), on_cpu(x, p, 0x123456789abcdef).bytes());
    }
  }
}

TEST_P(CudaDropout, GivesTheCpuBitsInEveryOrderOfTheThreads) {
  emulator::device().max_thread_blocks = 1;  // the grid's loop runs
  HostTensor x = input(9001), seed = seed_tensor(-42);
  const HostTensor wanted = on_cpu(x, 0.5, -42);
  in_every_order([&] {
    HostTensor out(dtype, {9001});
    dropout(on_cuda(x.view()), 0.5, on_cuda(seed.view()), on_cuda(out.view()), {});
    EXPECT_EQ(out.bytes(), wanted.bytes());
  });
}

TEST_P(CudaDropout, TheOutputMayBeTheInputAndUnaligned) {
  const std::size_t element = dtype == DType::float32 ? 4 : 2;
  HostTensor seed = seed_tensor(11);
  for (const std::int64_t count : {5, 3001}) {
    for (const std::size_t offset : {std::size_t{0}, element, 3 * element}) {
      HostTensor x = input(count);
      const HostTensor wanted = on_cpu(x, 0.25, 11);
      {
        Shifted shifted(x, offset);
        dropout(shifted.view(), 0.25, on_cuda(seed.view()), shifted.view(), {});
      }
      EXPECT_EQ(x.bytes(), wanted.bytes()) << count << " elements, offset " << offset;
    }
  }
}

TEST_P(CudaDropout, OnlyOneOfTheTwoTensorsMayBeUnaligned) {
  const std::size_t element = dtype == DType::float32 ? 4 : 2;
  HostTensor x = input(1001), out(dtype, {1001}), seed = seed_tensor(12);
  {
    Shifted shifted(out, element);
    dropout(on_cuda(x.view()), 0.5, on_cuda(seed.view()), shifted.view(), {});
  }
  EXPECT_EQ(out.bytes(), on_cpu(x, 0.5, 12).bytes());
}

TEST_P(CudaDropout, NeitherWaitsNorTakesMemory) {
  HostTensor x = input(100), out(dtype, {100}), seed = seed_tensor(1);
  int stream = 0;
  const auto run = [&] {
    dropout(on_cuda(x.view()), 0.5, on_cuda(seed.view()), on_cuda(out.view()), {.stream = &stream});
  };
  run();  // the first launch loads the kernel, which takes memory
  emulator::device().is_capturing = true;
  emulator::device().is_out_of_memory = true;
  run();
  EXPECT_EQ(emulator::device().synchronize_count, 0);
  EXPECT_EQ(emulator::device().launch_count, 2);
  EXPECT_EQ(static_cast<void*>(emulator::device().stream), &stream);
}

INSTANTIATE_TEST_SUITE_P(Dtypes, CudaDropout, float_dtypes, test_name_of);

}  // namespace
}  // namespace qlora
