#include <cmath>

#include "core/operations.h"
#include "support/expect_error.h"
#include "support/host_tensor.h"
#include "support/optimizer_tensors.h"

namespace qlora {
namespace {

/// Valid arguments: a list of one parameter of 300 elements, which is two blocks of 8-bit state.
class AdamWValidation : public testing::Test {
 protected:
  Generator generator{7};
  HostTensor param = HostTensor::random(DType::bfloat16, {3, 100}, generator);
  HostTensor grad = HostTensor::random(DType::bfloat16, {3, 100}, generator);
  HostTensor exp_avg = HostTensor::random(DType::float32, {3, 100}, generator);
  HostTensor exp_avg_sq = HostTensor::random(DType::float32, {3, 100}, generator);
  HostTensor codes{DType::uint8, {300}, std::vector<double>(300, 127.0)};
  HostTensor codes_sq{DType::uint8, {300}, std::vector<double>(300, 0.0)};
  HostTensor absmax{DType::float32, {2}, {0.0, 0.0}}, absmax_sq{DType::float32, {2}, {0.0, 0.0}};

  OptimizerTensor tensor =
      with_32bit_state(param.view(), grad.view(), exp_avg.view(), exp_avg_sq.view());
  OptimizerTensor tensor8bit = with_8bit_state(param.view(), grad.view(), codes.view(),
                                               absmax.view(), codes_sq.view(), absmax_sq.view());
  OptimizerStep step;

  void expect_step_error(const std::string& text) {
    const OptimizerTensor good =
        with_32bit_state(param.view(), grad.view(), exp_avg.view(), exp_avg_sq.view());
    const std::vector<OptimizerTensor> tensors = {good,
                                                  tensor};  // the second one is checked as well
    expect_invalid("adamw_step: " + text, [&] { adamw_step(tensors, step, {}); });
  }
  void expect_8bit_error(const std::string& text) {
    expect_invalid("adamw8bit_step: " + text,
                   [&] { adamw_step(std::span(&tensor8bit, 1), step, {}); });
  }
  void expect_error_of_both(const std::string& text) {
    expect_step_error(text);
    expect_8bit_error(text);
  }
};

TEST_F(AdamWValidation, TheUnspoiledArgumentsAreValid) {
  adamw_step(std::span(&tensor, 1), step, {});
  adamw_step(std::span(&tensor8bit, 1), step, {});
}
TEST_F(AdamWValidation, AnEmptyListIsValid) {
  adamw_step({}, step, {});
  adamw_step({}, step, {});
}

TEST_F(AdamWValidation, LearningRateMustBeFiniteAndNotNegative) {
  step.lr = -0.5;
  expect_error_of_both("lr is -0.5, want a finite number of at least 0");
  step.lr = std::nan("");
  expect_error_of_both("lr is nan, want a finite number of at least 0");
  step.lr = HUGE_VAL;
  expect_error_of_both("lr is inf, want a finite number of at least 0");
}
TEST_F(AdamWValidation, EpsMustBeFiniteAndNotNegative) {
  step.eps = -1.0;
  expect_error_of_both("eps is -1, want a finite number of at least 0");
}
TEST_F(AdamWValidation, WeightDecayMustBeFiniteAndNotNegative) {
  step.weight_decay = -1.0;
  expect_error_of_both("weight_decay is -1, want a finite number of at least 0");
}
TEST_F(AdamWValidation, BetasMustBeBelowOne) {
  step.beta1 = 1.0;
  expect_error_of_both("beta1 is 1, want 0 <= beta1 < 1");
  step.beta1 = 0.9;
  step.beta2 = -0.25;
  expect_error_of_both("beta2 is -0.25, want 0 <= beta2 < 1");
}
TEST_F(AdamWValidation, StepsCountFromOne) {
  step.step = 0;
  expect_error_of_both("step is 0, want at least 1");
}
TEST_F(AdamWValidation, NumbersAreCheckedWithAnEmptyListToo) {
  step.step = 0;
  expect_invalid("adamw_step: step is 0, want at least 1", [&] { adamw_step({}, step, {}); });
}

TEST_F(AdamWValidation, NumbersInMemoryMustBeOneFloatOnTheDeviceOfTheParameters) {
  HostTensor number(DType::float32, {1}, {1.0}), two(DType::float32, {2}),
      half(DType::float16, {1});
  struct Number {
    TensorView& view;
    const char* name;
  };
  for (const auto& [view, name] : {Number{step.lr_tensor, "lr_tensor"},
                                   {step.grad_scale, "grad_scale"},
                                   {step.found_inf, "found_inf"}}) {
    view = two.view();
    expect_error_of_both(message(name, " of shape [2] has 2 elements, want 1"));
    view = half.view();
    expect_error_of_both(message(name, " is float16, want float32"));
    view = number.view();
    view.device = {DeviceType::cuda, 0};
    expect_error_of_both(message(name, " is on cuda:0, but the other tensors are on cpu"));
    view = {};
  }
}
TEST_F(AdamWValidation, AStepCountMustBeOneFloat) {
  HostTensor half(DType::float16, {1});
  tensor.step_count = tensor8bit.step_count = half.view();
  expect_error_of_both("step_count is float16, want float32");
}

TEST_F(AdamWValidation, StepRefusesAnIntegerParameter) {
  tensor.param.dtype = DType::int64;
  expect_step_error("param is int64, want float32, bfloat16 or float16");
}
TEST_F(AdamWValidation, StepRefusesAParameterThatIsNotContiguous) {
  tensor.param.is_contiguous = false;
  expect_step_error("param of shape [3, 100] is not contiguous; pass param.contiguous()");
}
TEST_F(AdamWValidation, StepRefusesAParameterOnAnotherDeviceThanTheFirst) {
  tensor.param.device = {DeviceType::cuda, 2};
  expect_step_error("param is on cuda:2, but the other tensors are on cpu");
}
TEST_F(AdamWValidation, StepRefusesAnIntegerGradient) {
  tensor.grad.dtype = DType::uint8;
  expect_step_error("grad is uint8, want float32, bfloat16 or float16");
}
TEST_F(AdamWValidation, StepRefusesAMissingGradient) {
  tensor.grad.is_present = false;
  expect_step_error("grad is missing");
}
TEST_F(AdamWValidation, StepRefusesAGradientOfAnotherShape) {
  tensor.grad.shape = {300};
  expect_step_error("grad has shape [300], want [3, 100]");
}
TEST_F(AdamWValidation, StepRefusesMomentsOfAnotherDtype) {
  tensor.state.exp_avg.dtype = DType::bfloat16;
  expect_step_error("exp_avg is bfloat16, want float32");
  tensor.state.exp_avg.dtype = DType::float32;
  tensor.state.exp_avg_sq.dtype = DType::float16;
  expect_step_error("exp_avg_sq is float16, want float32");
}
TEST_F(AdamWValidation, StepRefusesMomentsOfTheWrongSize) {
  tensor.state.exp_avg.shape = {3, 99};
  expect_step_error("exp_avg of shape [3, 99] has 297 elements, want 300");
  tensor.state.exp_avg.shape = {300};
  tensor.state.exp_avg_sq.shape = {301};
  expect_step_error("exp_avg_sq of shape [301] has 301 elements, want 300");
}

TEST_F(AdamWValidation, Step8bitRefusesAGradientOfAnotherShape) {
  tensor8bit.grad.shape = {300};
  expect_8bit_error("grad has shape [300], want [3, 100]");
}
TEST_F(AdamWValidation, Step8bitRefusesCodesOfAnotherDtype) {
  tensor8bit.state.exp_avg.dtype = DType::float32;
  expect_8bit_error("exp_avg is float32, want uint8");
  tensor8bit.state.exp_avg.dtype = DType::uint8;
  tensor8bit.state.exp_avg_sq.dtype = DType::float32;
  expect_8bit_error("exp_avg_sq is float32, want uint8");
}
TEST_F(AdamWValidation, Step8bitRefusesCodesOfTheWrongSize) {
  tensor8bit.state.exp_avg.shape = {299};
  expect_8bit_error("exp_avg of shape [299] has 299 elements, want 300");
  tensor8bit.state.exp_avg.shape = {300};
  tensor8bit.state.exp_avg_sq.shape = {301};
  expect_8bit_error("exp_avg_sq of shape [301] has 301 elements, want 300");
}
TEST_F(AdamWValidation, Step8bitRefusesAbsmaxOfAnotherDtype) {
  tensor8bit.state.exp_avg_absmax.dtype = DType::uint8;
  expect_8bit_error("exp_avg_absmax is uint8, want float32");
  tensor8bit.state.exp_avg_absmax.dtype = DType::float32;
  tensor8bit.state.exp_avg_sq_absmax.dtype = DType::uint8;
  expect_8bit_error("exp_avg_sq_absmax is uint8, want float32");
}
TEST_F(AdamWValidation, Step8bitRefusesAbsmaxOfTheWrongSize) {
  tensor8bit.state.exp_avg_absmax.shape = {1};
  expect_8bit_error("exp_avg_absmax of shape [1] has 1 elements, want 2");
  tensor8bit.state.exp_avg_absmax.shape = {2};
  tensor8bit.state.exp_avg_sq_absmax.shape = {3};
  expect_8bit_error("exp_avg_sq_absmax of shape [3] has 3 elements, want 2");
}

}  // namespace
}  // namespace qlora
