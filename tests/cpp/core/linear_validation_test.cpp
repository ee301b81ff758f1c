#include "support/expect_error.h"
#include "support/stored_weight.h"

namespace qlora {
namespace {

/// Valid arguments with m = 3, n = 5, k = 40. A test spoils one of them.
class LinearValidation : public testing::Test {
 protected:
  Generator generator{5};
  StoredWeight memory = StoredWeight::random(5, 40, 32, true, generator);
  HostTensor x_memory = HostTensor::random(DType::bfloat16, {3, 40}, generator);
  HostTensor y_memory = HostTensor::random(DType::bfloat16, {3, 5}, generator);
  HostTensor bias_memory = HostTensor::random(DType::bfloat16, {5}, generator);

  NF4Weight weight = memory.view();
  TensorView x = x_memory.view(), y = y_memory.view(), bias = bias_memory.view();

  void expect_linear_error(const std::string& text) {
    expect_invalid("nf4_linear: " + text, [&] { nf4_linear(x, weight, bias, y, {}); });
  }
  void expect_grad_input_error(const std::string& text) {
    expect_invalid("nf4_linear_grad_input: " + text,
                   [&] { nf4_linear_grad_input(y, weight, x, {}); });
  }
};

TEST_F(LinearValidation, TheUnspoiledArgumentsAreValid) {
  nf4_linear(x, weight, bias, y, {});
  nf4_linear_grad_input(y, weight, x, {});
}

TEST_F(LinearValidation, LinearRefusesABadWeight) {
  weight.block_size = 48;
  expect_linear_error("block_size is 48, want a power of two from 32 to 4096");
}
TEST_F(LinearValidation, LinearRefusesAnIntegerInput) {
  x.dtype = DType::int64;
  expect_linear_error("x is int64, want float32, bfloat16 or float16");
}
TEST_F(LinearValidation, LinearRefusesAnInputOnAnotherDevice) {
  x.device = {DeviceType::cuda, 0};
  expect_linear_error("x is on cuda:0, but the other tensors are on cpu");
}
TEST_F(LinearValidation, LinearRefusesAnInputThatIsNotContiguous) {
  x.is_contiguous = false;
  expect_linear_error("x of shape [3, 40] is not contiguous; pass x.contiguous()");
}
TEST_F(LinearValidation, LinearRefusesAnInputOfThreeDimensions) {
  x.shape = {1, 3, 40};
  expect_linear_error("x has shape [1, 3, 40], want 2 dimensions");
}
TEST_F(LinearValidation, LinearRefusesAnotherK) {
  x.shape = {3, 32};
  expect_linear_error("x has k=32, w has k=40");
}
TEST_F(LinearValidation, LinearRefusesAMissingOutput) {
  y.is_present = false;
  expect_linear_error("y is missing");
}
TEST_F(LinearValidation, LinearRefusesAnOutputOfAnotherDtype) {
  y.dtype = DType::float32;
  expect_linear_error("y is float32, want bfloat16");
}
TEST_F(LinearValidation, LinearRefusesAnOutputOfAnotherShape) {
  y.shape = {5, 3};
  expect_linear_error("y has shape [5, 3], want [3, 5]");
}
TEST_F(LinearValidation, LinearRefusesABiasOfAnotherDtype) {
  bias.dtype = DType::float16;
  expect_linear_error("bias is float16, want bfloat16");
}
TEST_F(LinearValidation, LinearRefusesABiasOfAnotherShape) {
  bias.shape = {1, 5};
  expect_linear_error("bias has shape [1, 5], want [5]");
}

TEST_F(LinearValidation, GradInputRefusesABadWeight) {
  weight.absmax.is_present = false;
  expect_grad_input_error("absmax is missing");
}
TEST_F(LinearValidation, GradInputRefusesAnIntegerGradient) {
  y.dtype = DType::uint8;
  expect_grad_input_error("dy is uint8, want float32, bfloat16 or float16");
}
TEST_F(LinearValidation, GradInputRefusesAGradientOfOneDimension) {
  y.shape = {5};
  expect_grad_input_error("dy has shape [5], want 2 dimensions");
}
TEST_F(LinearValidation, GradInputRefusesAnotherN) {
  y.shape = {3, 4};
  expect_grad_input_error("dy has n=4, w has n=5");
}
TEST_F(LinearValidation, GradInputRefusesAnOutputOfAnotherDtype) {
  x.dtype = DType::float32;
  expect_grad_input_error("dx is float32, want bfloat16");
}
TEST_F(LinearValidation, GradInputRefusesAnOutputOfAnotherShape) {
  x.shape = {3, 41};
  expect_grad_input_error("dx has shape [3, 41], want [3, 40]");
}

}  // namespace
}  // namespace qlora
