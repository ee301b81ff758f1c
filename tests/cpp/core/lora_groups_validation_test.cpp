#include "core/operations.h"
#include "support/expect_error.h"
#include "support/host_tensor.h"

namespace qlora {
namespace {

/// Valid arguments with m = 6, n = 5, k = 40 and two adapters. A test spoils one of them.
class LoRAGroupsValidation : public testing::Test {
 protected:
  Generator generator{6};
  HostTensor x = HostTensor::random(DType::bfloat16, {6, 40}, generator);
  HostTensor y = HostTensor::random(DType::bfloat16, {6, 5}, generator);
  HostTensor dx = HostTensor::random(DType::bfloat16, {6, 40}, generator);
  HostTensor t = HostTensor::random(DType::bfloat16, {2 * 4 + 3 * 2}, generator);
  HostTensor a0 = HostTensor::random(DType::float32, {4, 40}, generator);
  HostTensor b0 = HostTensor::random(DType::float32, {5, 4}, generator);
  HostTensor a1 = HostTensor::random(DType::float16, {2, 40}, generator);
  HostTensor b1 = HostTensor::random(DType::float16, {5, 2}, generator);
  HostTensor grad_a0 = a0, grad_b0 = b0, grad_a1 = a1, grad_b1 = b1;
  HostTensor seed{DType::int64, {1}, {7.0}};

  std::vector<LoRAAdapter> adapters = {{a0.view(), b0.view(), grad_a0.view(), grad_b0.view()},
                                       {a1.view(), b1.view(), grad_a1.view(), grad_b1.view()}};
  std::vector<LoRAGroup> groups = {{0, 2, 0, 1.0f, 0.5, seed.view()}, {3, 6, 1}};
  TensorView x_view = x.view(), y_view = y.view(), t_view = t.view(), dx_view = dx.view();

  void forward() { lora_forward_grouped({x_view, adapters, groups, t_view, y_view}, {}); }
  void backward() {
    lora_backward_grouped({y_view, x_view, t_view, adapters, groups, dx_view}, {});
  }

  /// Of both operations, and nothing has been written.
  void expect_error(const std::string& text) {
    const HostTensor before = y, dx_before = dx;
    expect_invalid("lora_forward_grouped: " + text, [&] { forward(); });
    expect_invalid("lora_backward_grouped: " + text, [&] { backward(); });
    EXPECT_EQ(y.bytes(), before.bytes());
    EXPECT_EQ(dx.bytes(), dx_before.bytes());
  }
};

TEST_F(LoRAGroupsValidation, TheUnspoiledArgumentsAreValid) {
  forward();
  backward();
  dx_view = {};
  backward();
}
TEST_F(LoRAGroupsValidation, RowsBeyondXAreRefused) {
  groups[1].end = 7;
  expect_error("group 1 has rows 3 to 7, want 0 <= begin <= end <= 6, the rows of x");
}
TEST_F(LoRAGroupsValidation, RowsBeforeXAreRefused) {
  groups[0].begin = -1;
  expect_error("group 0 has rows -1 to 2, want 0 <= begin <= end <= 6, the rows of x");
}
TEST_F(LoRAGroupsValidation, RowsThatEndBeforeTheyBeginAreRefused) {
  groups[1].begin = 7;
  expect_error("group 1 has rows 7 to 6, want 0 <= begin <= end <= 6, the rows of x");
}
TEST_F(LoRAGroupsValidation, AnAdapterThatIsNotThereIsRefused) {
  groups[1].adapter = 2;
  expect_error("group 1 has adapter 2, want one of 2");
}
TEST_F(LoRAGroupsValidation, AProbabilityOfOneIsRefused) {
  groups[0].p = 1.0;
  expect_error("p of group 0 is 1, want 0 <= p < 1");
}
TEST_F(LoRAGroupsValidation, DropoutWithoutASeedIsRefused) {
  groups[1].p = 0.5;
  expect_error("group 1 has p 0.5, but no seed");
}
TEST_F(LoRAGroupsValidation, ASeedOfAnotherTypeIsRefused) {
  groups[0].seed.dtype = DType::float32;
  expect_error("seed of group 0 is float32, want int64");
}
TEST_F(LoRAGroupsValidation, AFactorOfAnotherLayerIsRefused) {
  adapters[1].lora_a.shape = {2, 39};
  expect_error("lora_a[1] has shape [2, 39], want [2, 40]");
}
TEST_F(LoRAGroupsValidation, AFactorOfAnotherRankIsRefused) {
  adapters[1].lora_b.shape = {5, 3};
  expect_error("lora_b[1] has shape [5, 3], want [5, 2]");
}
TEST_F(LoRAGroupsValidation, FactorsOfTwoTypesAreRefused) {
  adapters[0].lora_b.dtype = DType::bfloat16;
  expect_error("lora_b[0] is bfloat16, want float32");
}
TEST_F(LoRAGroupsValidation, ATOfTheWrongSizeIsRefused) {
  t_view.shape = {13};
  expect_error("t of shape [13] has 13 elements, want 14");
}
TEST_F(LoRAGroupsValidation, AYOfOtherRowsIsRefused) {
  y_view.shape = {5, 5};
  expect_invalid("lora_forward_grouped: y has shape [5, 5], want [6, 5]", [&] { forward(); });
  expect_invalid("lora_backward_grouped: dy has shape [5, 5], want [6, 5]", [&] { backward(); });
}
TEST_F(LoRAGroupsValidation, GradientsOfAnotherShapeOrTypeAreRefused) {
  adapters[1].grad_a.shape = {3, 40};
  expect_invalid("lora_backward_grouped: grad_a[1] has shape [3, 40], want [2, 40]",
                 [&] { backward(); });
  adapters[1].grad_a.shape = {2, 40};
  adapters[0].grad_b.dtype = DType::bfloat16;
  expect_invalid("lora_backward_grouped: grad_b[0] is bfloat16, want float32", [&] { backward(); });
}
TEST_F(LoRAGroupsValidation, ADxOfAnotherShapeIsRefused) {
  dx_view.shape = {6, 39};
  expect_invalid("lora_backward_grouped: dx has shape [6, 39], want [6, 40]", [&] { backward(); });
}

// ---- DoRA

class DoRAValidation : public testing::Test {
 protected:
  Generator generator{6};
  HostTensor rows = HostTensor::random(DType::bfloat16, {3, 5}, generator), y = rows;
  HostTensor gain = HostTensor::random(DType::float32, {5}, generator), sums = gain;
  HostTensor bias = HostTensor::random(DType::bfloat16, {5}, generator);
  DoRAScale scale = {rows.view(), gain.view(), rows.view(), bias.view(), y.view()};
  DoRAScaleBackward backward = {rows.view(), rows.view(), gain.view(), y.view(), sums.view()};

  void expect_scale_error(const std::string& text) {
    expect_invalid("dora_scale: " + text, [&] { dora_scale(scale, {}); });
  }
  void expect_backward_error(const std::string& text) {
    expect_invalid("dora_scale_backward: " + text, [&] { dora_scale_backward(backward, {}); });
  }
};

TEST_F(DoRAValidation, TheUnspoiledArgumentsAreValid) {
  dora_scale(scale, {});
  dora_scale_backward(backward, {});
}
TEST_F(DoRAValidation, AGainOfAnotherTypeOrSizeIsRefused) {
  scale.gain.dtype = backward.gain.dtype = DType::bfloat16;
  expect_scale_error("gain is bfloat16, want float32");
  expect_backward_error("gain is bfloat16, want float32");
  scale.gain = backward.gain = gain.view();
  scale.gain.shape = backward.gain.shape = {4};
  expect_scale_error("gain has shape [4], want [5]");
  expect_backward_error("gain has shape [4], want [5]");
}
TEST_F(DoRAValidation, WhatIsAddedFitsTheRows) {
  scale.bias.shape = {6};
  expect_scale_error("bias has shape [6], want [5]");
  scale.bias = {};
  scale.addend.dtype = DType::float32;
  expect_scale_error("addend is float32, want bfloat16");
}
TEST_F(DoRAValidation, OutputsFitTheRows) {
  scale.y.shape = {5, 3};
  expect_scale_error("y has shape [5, 3], want [3, 5]");
  backward.scaled.shape = {5, 3};
  expect_backward_error("scaled has shape [5, 3], want [3, 5]");
}
TEST_F(DoRAValidation, RowsAndSumsComeTogether) {
  backward.sums = {};
  expect_backward_error("rows and sums come together or not at all");
}

}  // namespace
}  // namespace qlora
