// lora_forward and lora_backward on the emulated device against fp64.
#include "cuda/support.h"
#include "support/lora_case.h"

namespace qlora {
namespace {

LoRAForward on_cuda(LoRAForward arguments) {
  for (TensorView* view :
       {&arguments.x, &arguments.lora_a, &arguments.lora_b, &arguments.t, &arguments.y}) {
    *view = qlora::on_cuda(*view);
  }
  return arguments;
}

LoRABackward on_cuda(LoRABackward arguments) {
  for (TensorView* view :
       {&arguments.dy, &arguments.x, &arguments.t, &arguments.lora_a, &arguments.lora_b,
        &arguments.grad_a, &arguments.grad_b, &arguments.dx}) {
    *view = qlora::on_cuda(*view);
  }
  return arguments;
}

// Around the edges of the kernels' tiles (128 rows or columns, 64 of what is summed over, 64 tokens,
// 16 and 64 ranks) and of chunks of 8, which decide between the tensor cores and the plain kernels.
constexpr LoRAShape shapes[] = {
    {1, 40, 72, 8},    {7, 136, 264, 16}, {70, 264, 200, 3},  {130, 72, 328, 40}, {3, 264, 8, 64},
    {65, 24, 72, 100}, {64, 128, 64, 1},  {2, 520, 1096, 16},  // both sums over columns in parts
    {530, 24, 40, 24},                                         // the gradients in parts
    {5, 33, 31, 7},    {9, 24, 33, 5},    {9, 33, 24, 16},    {1, 1, 1, 1},       {3, 16, 24, 260},
    {0, 8, 16, 2},     {4, 0, 16, 2},     {4, 8, 0, 2},       {4, 8, 16, 0},      {4, 5, 0, 2}};

/// The parameters: dtype of x, dtype of the factors.
class CudaLoRA : public CudaEmulation,
                 public testing::WithParamInterface<std::tuple<DType, DType>> {
 protected:
  const DType dtype = std::get<0>(GetParam()), factor_dtype = std::get<1>(GetParam());
  Generator generator{14};
};

TEST_P(CudaLoRA, ForwardWritesTAndAddsTheUpdateToY) {
  for (const LoRAShape& shape : shapes) {
    SCOPED_TRACE(message(shape));
    LoRAForwardCase forward(dtype, factor_dtype, shape, generator);
    lora_forward(on_cuda(forward.arguments()), {});
    forward.expect_right();
  }
}

TEST_P(CudaLoRA, BackwardGivesTheThreeGradients) {
  for (const LoRAShape& shape : shapes) {
    SCOPED_TRACE(message(shape));
    LoRABackwardCase backward(dtype, factor_dtype, shape, generator);
    lora_backward(on_cuda(backward.arguments()), {});
    backward.expect_right();
  }
}

TEST_P(CudaLoRA, TensorsMayBeUnaligned) {
  const std::size_t element = dtype == DType::float32 ? 4 : 2;
  const std::size_t factor_element = factor_dtype == DType::float32 ? 4 : 2;
  const LoRAShape shape = {9, 40, 72, 16};
  {  // The narrow matrices and the factors: the tensor cores' kernels read them in other ways.
    LoRAForwardCase forward(dtype, factor_dtype, shape, generator);
    {
      Shifted t(forward.t, element), a(forward.lora_a, factor_element),
          b(forward.lora_b, factor_element);
      LoRAForward arguments = on_cuda(forward.arguments());
      arguments.t = t.view(), arguments.lora_a = a.view(), arguments.lora_b = b.view();
      lora_forward(arguments, {});
    }
    forward.expect_right();
    LoRABackwardCase backward(dtype, factor_dtype, shape, generator);
    {
      Shifted t(backward.t, element), grad_a(backward.grad_a, factor_element),
          grad_b(backward.grad_b, factor_element);
      LoRABackward arguments = on_cuda(backward.arguments());
      arguments.t = t.view(), arguments.grad_a = grad_a.view(), arguments.grad_b = grad_b.view();
      lora_backward(arguments, {});
    }
    backward.expect_right();
  }
  {  // The wide ones: plain kernels.
    LoRAForwardCase forward(dtype, factor_dtype, shape, generator);
    {
      Shifted x(forward.x, element), y(forward.y, element);
      LoRAForward arguments = on_cuda(forward.arguments());
      arguments.x = x.view(), arguments.y = y.view();
      lora_forward(arguments, {});
    }
    forward.expect_right();
    LoRABackwardCase backward(dtype, factor_dtype, shape, generator);
    {
      Shifted dy(backward.dy, element), dx(backward.dx, element);
      LoRABackward arguments = on_cuda(backward.arguments());
      arguments.dy = dy.view(), arguments.dx = dx.view();
      lora_backward(arguments, {});
    }
    backward.expect_right();
  }
}

TEST_P(CudaLoRA, BackwardWithoutDxGivesTheSameGradients) {
  LoRABackwardCase with(dtype, factor_dtype, {9, 24, 40, 4}, generator), without = with;
  without.dx = HostTensor();
  lora_backward(on_cuda(with.arguments()), {});
  lora_backward(on_cuda(without.arguments()), {});
  EXPECT_EQ(with.grad_a.bytes(), without.grad_a.bytes());
  EXPECT_EQ(with.grad_b.bytes(), without.grad_b.bytes());
}

TEST_P(CudaLoRA, ZeroBLeavesYAsItWas) {
  LoRAForwardCase forward(dtype, factor_dtype, {5, 24, 40, 4}, generator);
  for (std::int64_t i = 0; i < forward.lora_b.numel(); ++i) forward.lora_b.set(i, 0.0);
  const HostTensor before = forward.y;
  lora_forward(on_cuda(forward.arguments()), {});
  EXPECT_EQ(forward.y.bytes(), before.bytes());
}

INSTANTIATE_TEST_SUITE_P(Dtypes, CudaLoRA, testing::Combine(float_dtypes, float_dtypes),
                         [](const auto& instance) {
                           return std::string(name_of(std::get<0>(instance.param))) + "Factors" +
                                  name_of(std::get<1>(instance.param));
                         });

class CudaLoRAOrders : public CudaEmulation, public testing::WithParamInterface<DType> {};

/// Splits on: 16 parts of u and of t's sum at most, 2 of the gradients'.
TEST_P(CudaLoRAOrders, TheBitsDoNotDependOnTheOrderOfTheThreads) {
  for (const LoRAShape& shape : {LoRAShape{3, 520, 520, 40}, {513, 8, 8, 17}}) {
    SCOPED_TRACE(message(shape));
    Generator generator{16};
    const LoRAForwardCase forward(GetParam(), DType::float32, shape, generator);
    const LoRABackwardCase backward(GetParam(), DType::float32, shape, generator);
    std::vector<std::uint8_t> first;
    in_every_order([&] {
      LoRAForwardCase f = forward;
      LoRABackwardCase b = backward;
      lora_forward(on_cuda(f.arguments()), {});
      lora_backward(on_cuda(b.arguments()), {});
      std::vector<std::uint8_t> bytes;
      for (const HostTensor* out : {&f.t, &f.y, &b.grad_a, &b.grad_b, &b.dx}) {
        bytes.insert(bytes.end(), out->bytes().begin(), out->bytes().end());
      }
      if (first.empty()) first = bytes;
      EXPECT_EQ(bytes, first);
    });
  }
}

INSTANTIATE_TEST_SUITE_P(Dtypes, CudaLoRAOrders, float_dtypes, test_name_of);

TEST_F(CudaEmulation, PlainLoRAKernelsGoRoundTheirGrid) {
  emulator::device().max_thread_blocks = 1;
  Generator generator{17};
  LoRAForwardCase forward(DType::float32, DType::float32, {20, 35, 21, 5}, generator);
  lora_forward(on_cuda(forward.arguments()), {});
  forward.expect_right();
  LoRABackwardCase backward(DType::bfloat16, DType::float32, {20, 71, 69, 5}, generator);
  lora_backward(on_cuda(backward.arguments()), {});
  backward.expect_right();
}

TEST_F(CudaEmulation, LoRAExpandTakesSeveralTilesOfTokens) {
  Generator generator{19};
  LoRAForwardCase forward(DType::bfloat16, DType::float32, {1057 * 64 + 3, 8, 8, 3}, generator);
  lora_forward(on_cuda(forward.arguments()), {});
  forward.expect_right();
}

class CudaLoRADevice : public CudaEmulation {
 protected:
  Generator generator{18};
  LoRAForwardCase forward{DType::bfloat16, DType::float32, {3, 520, 520, 16}, generator};
  LoRABackwardCase backward{DType::bfloat16, DType::float32, {3, 520, 520, 16}, generator};
};

TEST_F(CudaLoRADevice, NeverWaitsAndCanBeCaptured) {
  emulator::device().is_capturing = true;
  int stream = 0;
  lora_forward(on_cuda(forward.arguments()), {.stream = &stream});
  EXPECT_EQ(emulator::device().launch_count, 3);  // shrink, its parts, expand
  lora_backward(on_cuda(backward.arguments()), {.stream = &stream});
  EXPECT_EQ(emulator::device().launch_count, 7);  // shrink, its parts, gradients, expand
  EXPECT_EQ(emulator::device().synchronize_count, 0);
  EXPECT_EQ(static_cast<void*>(emulator::device().stream), &stream);
}

TEST_F(CudaLoRADevice, WithoutMemoryNothingIsTouched) {
  emulator::device().is_out_of_memory = true;
  const HostTensor y = forward.y, dx = backward.dx;
  EXPECT_THROW(lora_forward(on_cuda(forward.arguments()), {}), OutOfMemory);
  EXPECT_THROW(lora_backward(on_cuda(backward.arguments()), {}), OutOfMemory);
  EXPECT_EQ(emulator::device().launch_count, 0);
  EXPECT_EQ(forward.y.bytes(), y.bytes());
  EXPECT_EQ(backward.dx.bytes(), dx.bytes());
}

TEST_F(CudaLoRADevice, AFailedLaunchFreesTheScratchMemory) {
  emulator::device().launch_error = cudaErrorIllegalAddress;
  EXPECT_THROW(lora_forward(on_cuda(forward.arguments()), {}), CudaError);
  EXPECT_THROW(lora_backward(on_cuda(backward.arguments()), {}), CudaError);
}

}  // namespace
}  // namespace qlora
