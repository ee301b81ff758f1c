// lora_forward and lora_backward against fp64.
#include "support/lora_case.h"

namespace qlora {
namespace {

// Around the edges of the kernels' tiles (16 tokens, ranks or columns; 32 of what is summed over), of
// their blocks of 64 tokens and of their chunks of 512 columns and more.
constexpr LoRAShape shapes[] = {
    {1, 1, 1, 1},      {1, 5, 3, 2},        {1, 64, 33, 16},   {3, 17, 31, 8},
    {7, 1, 65, 4},     {5, 33, 1, 7},       {70, 9, 40, 3},    {2, 130, 257, 64},
    {0, 5, 6, 2},      {4, 0, 6, 2},        {4, 5, 0, 2},      {4, 5, 6, 0},
    {32, 64, 96, 16},  {64, 32, 32, 32},    {15, 31, 33, 17},  {17, 47, 100, 7},
    {33, 65, 15, 33},  {100, 48, 80, 1},    {65, 515, 40, 16}, {16, 40, 515, 15},
    {20, 36, 52, 130}, {100, 1025, 513, 5}, {9, 20, 1100, 70}, {128, 16, 16, 64},
    {17, 33, 17, 260}};

/// The parameters: dtype of x, dtype of the factors.
class CpuLoRA : public testing::TestWithParam<std::tuple<DType, DType>> {
 protected:
  const DType dtype = std::get<0>(GetParam()), factor_dtype = std::get<1>(GetParam());
  Generator generator{14};
};

TEST_P(CpuLoRA, ForwardWritesTAndAddsTheUpdateToY) {
  for (const LoRAShape& shape : shapes) {
    SCOPED_TRACE(message(shape));
    LoRAForwardCase forward(dtype, factor_dtype, shape, generator);
    lora_forward(forward.arguments(), {});
    forward.expect_right();
  }
}

TEST_P(CpuLoRA, BackwardGivesTheThreeGradients) {
  for (const LoRAShape& shape : shapes) {
    SCOPED_TRACE(message(shape));
    LoRABackwardCase backward(dtype, factor_dtype, shape, generator);
    lora_backward(backward.arguments(), {});
    backward.expect_right();
  }
}

TEST_P(CpuLoRA, BackwardWithoutDxGivesTheSameGradients) {
  HostTensor dy = HostTensor::random(dtype, {9, 20}, generator);
  HostTensor x = HostTensor::random(dtype, {9, 33}, generator);
  HostTensor t = HostTensor::random(dtype, {9, 4}, generator);
  HostTensor lora_a = HostTensor::random(factor_dtype, {4, 33}, generator);
  HostTensor lora_b = HostTensor::random(factor_dtype, {20, 4}, generator);
  HostTensor dx = HostTensor::random(dtype, {9, 33}, generator), absent;
  std::vector<HostTensor> gradients;
  for (HostTensor* const maybe_dx : {&dx, &absent}) {
    HostTensor grad_a(factor_dtype, {4, 33}), grad_b(factor_dtype, {20, 4});
    lora_backward({dy.view(), x.view(), t.view(), lora_a.view(), lora_b.view(), lora_scaling,
                   grad_a.view(), grad_b.view(), maybe_dx->view()},
                  {});
    gradients.push_back(grad_a);
    gradients.push_back(grad_b);
  }
  EXPECT_EQ(gradients[0].bytes(), gradients[2].bytes());
  EXPECT_EQ(gradients[1].bytes(), gradients[3].bytes());
}

TEST_P(CpuLoRA, ZeroBLeavesYAsItWas) {
  // A fresh adapter must not change the base by a bit.
  HostTensor x = HostTensor::random(dtype, {5, 33}, generator), t(dtype, {5, 4});
  HostTensor lora_a = HostTensor::random(factor_dtype, {4, 33}, generator);
  HostTensor lora_b(factor_dtype, {20, 4}, std::vector<double>(80, 0.0));
  HostTensor y = HostTensor::random(dtype, {5, 20}, generator);
  const HostTensor before = y;
  lora_forward({x.view(), lora_a.view(), lora_b.view(), lora_scaling, t.view(), y.view()}, {});
  EXPECT_EQ(y.bytes(), before.bytes());
}

INSTANTIATE_TEST_SUITE_P(Dtypes, CpuLoRA, testing::Combine(float_dtypes, float_dtypes),
                         [](const auto& instance) {
                           return std::string(name_of(std::get<0>(instance.param))) + "Factors" +
                                  name_of(std::get<1>(instance.param));
                         });

}  // namespace
}  // namespace qlora
