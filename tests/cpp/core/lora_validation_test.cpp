#include <cmath>

#include "core/operations.h"
#include "support/expect_error.h"
#include "support/host_tensor.h"

namespace qlora {
namespace {

/// Valid arguments with m = 3, n = 5, k = 40, r = 4. A test spoils one of them.
class LoRAValidation : public testing::Test {
 protected:
  Generator generator{6};
  HostTensor x = HostTensor::random(DType::bfloat16, {3, 40}, generator);
  HostTensor y = HostTensor::random(DType::bfloat16, {3, 5}, generator);
  HostTensor t = HostTensor::random(DType::bfloat16, {3, 4}, generator);
  HostTensor dx = HostTensor::random(DType::bfloat16, {3, 40}, generator);
  HostTensor lora_a = HostTensor::random(DType::float32, {4, 40}, generator);
  HostTensor lora_b = HostTensor::random(DType::float32, {5, 4}, generator);
  HostTensor grad_a{DType::float32, {4, 40}}, grad_b{DType::float32, {5, 4}};
  HostTensor seed{DType::int64, {1}, {7.0}};

  LoRAForward forward = {x.view(), lora_a.view(), lora_b.view(), 1.0f, t.view(), y.view()};
  LoRABackward backward = {y.view(), x.view(),      t.view(),      lora_a.view(), lora_b.view(),
                           1.0f,     grad_a.view(), grad_b.view(), dx.view()};

  void expect_forward_error(const std::string& text) {
    expect_invalid("lora_forward: " + text, [&] { lora_forward(forward, {}); });
  }
  void expect_backward_error(const std::string& text) {
    expect_invalid("lora_backward: " + text, [&] { lora_backward(backward, {}); });
  }
};

TEST_F(LoRAValidation, TheUnspoiledArgumentsAreValid) {
  lora_forward(forward, {});
  lora_backward(backward, {});
  backward.dx = {};
  lora_backward(backward, {});
}

TEST_F(LoRAValidation, ForwardRefusesAnIntegerInput) {
  forward.x.dtype = DType::uint8;
  expect_forward_error("x is uint8, want float32, bfloat16 or float16");
}
TEST_F(LoRAValidation, ForwardRefusesAnInputOfThreeDimensions) {
  forward.x.shape = {1, 3, 40};
  expect_forward_error("x has shape [1, 3, 40], want 2 dimensions");
}
TEST_F(LoRAValidation, ForwardRefusesAnInputOnAnotherDevice) {
  forward.x.device = {DeviceType::cuda, 0};
  expect_forward_error("x is on cuda:0, but the other tensors are on cpu");
}
TEST_F(LoRAValidation, ForwardRefusesAnIntegerFactor) {
  forward.lora_a.dtype = DType::int64;
  expect_forward_error("lora_a is int64, want float32, bfloat16 or float16");
}
TEST_F(LoRAValidation, ForwardRefusesAFactorThatIsNotContiguous) {
  forward.lora_a.is_contiguous = false;
  expect_forward_error("lora_a of shape [4, 40] is not contiguous; pass lora_a.contiguous()");
}
TEST_F(LoRAValidation, ForwardRefusesAFactorOfOneDimension) {
  forward.lora_a.shape = {160};
  expect_forward_error("lora_a has shape [160], want 2 dimensions");
}
TEST_F(LoRAValidation, ForwardRefusesFactorsOfDifferentDtypes) {
  forward.lora_b.dtype = DType::bfloat16;
  expect_forward_error("lora_b is bfloat16, want float32");
}
TEST_F(LoRAValidation, ForwardRefusesASecondFactorOfOneDimension) {
  forward.lora_b.shape = {20};
  expect_forward_error("lora_b has shape [20], want 2 dimensions");
}
TEST_F(LoRAValidation, ForwardRefusesAnotherK) {
  forward.lora_a.shape = {4, 41};
  expect_forward_error("x has k=40, lora_a has k=41");
}
TEST_F(LoRAValidation, ForwardRefusesFactorsOfDifferentRank) {
  forward.lora_b.shape = {5, 8};
  expect_forward_error("lora_a has r=4, lora_b has r=8");
}
TEST_F(LoRAValidation, ForwardRefusesTOfAnotherDtype) {
  forward.t.dtype = DType::float32;
  expect_forward_error("t is float32, want bfloat16");
}
TEST_F(LoRAValidation, ForwardRefusesTOfAnotherShape) {
  forward.t.shape = {4, 3};
  expect_forward_error("t has shape [4, 3], want [3, 4]");
}
TEST_F(LoRAValidation, ForwardRefusesYOfAnotherDtype) {
  forward.y.dtype = DType::float16;
  expect_forward_error("y is float16, want bfloat16");
}
TEST_F(LoRAValidation, ForwardRefusesYOfAnotherShape) {
  forward.y.shape = {3, 6};
  expect_forward_error("y has shape [3, 6], want [3, 5]");
}
TEST_F(LoRAValidation, ForwardRefusesAMissingY) {
  forward.y.is_present = false;
  expect_forward_error("y is missing");
}

TEST_F(LoRAValidation, BackwardRefusesAnotherK) {
  backward.x.shape = {3, 39};
  expect_backward_error("x has k=39, lora_a has k=40");
}
TEST_F(LoRAValidation, BackwardRefusesDyOfAnotherDtype) {
  backward.dy.dtype = DType::float32;
  expect_backward_error("dy is float32, want bfloat16");
}
TEST_F(LoRAValidation, BackwardRefusesDyOfAnotherShape) {
  backward.dy.shape = {2, 5};
  expect_backward_error("dy has shape [2, 5], want [3, 5]");
}
TEST_F(LoRAValidation, BackwardRefusesTOfAnotherDtype) {
  backward.t.dtype = DType::float16;
  expect_backward_error("t is float16, want bfloat16");
}
TEST_F(LoRAValidation, BackwardRefusesTOfAnotherShape) {
  backward.t.shape = {3, 5};
  expect_backward_error("t has shape [3, 5], want [3, 4]");
}
TEST_F(LoRAValidation, BackwardRefusesGradAOfAnotherDtype) {
  backward.grad_a.dtype = DType::bfloat16;
  expect_backward_error("grad_a is bfloat16, want float32");
}
TEST_F(LoRAValidation, BackwardRefusesGradAOfAnotherShape) {
  backward.grad_a.shape = {40, 4};
  expect_backward_error("grad_a has shape [40, 4], want [4, 40]");
}
TEST_F(LoRAValidation, BackwardRefusesGradBOfAnotherDtype) {
  backward.grad_b.dtype = DType::bfloat16;
  expect_backward_error("grad_b is bfloat16, want float32");
}
TEST_F(LoRAValidation, BackwardRefusesGradBOfAnotherShape) {
  backward.grad_b.shape = {4, 5};
  expect_backward_error("grad_b has shape [4, 5], want [5, 4]");
}
TEST_F(LoRAValidation, BackwardRefusesDxOfAnotherDtype) {
  backward.dx.dtype = DType::float32;
  expect_backward_error("dx is float32, want bfloat16");
}
TEST_F(LoRAValidation, BackwardRefusesDxOfAnotherShape) {
  backward.dx.shape = {3, 41};
  expect_backward_error("dx has shape [3, 41], want [3, 40]");
}

TEST_F(LoRAValidation, DropoutRefusesProbabilitiesOutsideItsRange) {
  const auto call = [&](double p) { dropout(x.view(), p, seed.view(), y.view(), {}); };
  expect_invalid("dropout: p is 1, want 0 <= p < 1", [&] { call(1.0); });
  expect_invalid("dropout: p is -0.1, want 0 <= p < 1", [&] { call(-0.1); });
  expect_invalid("dropout: p is nan, want 0 <= p < 1", [&] { call(std::nan("")); });
}
TEST_F(LoRAValidation, DropoutRefusesAnIntegerInput) {
  expect_invalid("dropout: x is int64, want float32, bfloat16 or float16",
                 [&] { dropout(seed.view(), 0.5, seed.view(), seed.view(), {}); });
}
TEST_F(LoRAValidation, DropoutRefusesASeedThatIsNotOneInt64) {
  HostTensor two_seeds(DType::int64, {2});
  expect_invalid("dropout: seed is float32, want int64",
                 [&] { dropout(x.view(), 0.5, grad_a.view(), dx.view(), {}); });
  expect_invalid("dropout: seed of shape [2] has 2 elements, want 1",
                 [&] { dropout(x.view(), 0.5, two_seeds.view(), dx.view(), {}); });
}
TEST_F(LoRAValidation, DropoutRefusesAnotherOutput) {
  expect_invalid("dropout: out is float32, want bfloat16",
                 [&] { dropout(x.view(), 0.5, seed.view(), lora_a.view(), {}); });
  expect_invalid("dropout: out has shape [3, 5], want [3, 40]",
                 [&] { dropout(x.view(), 0.5, seed.view(), y.view(), {}); });
}

}  // namespace
}  // namespace qlora
