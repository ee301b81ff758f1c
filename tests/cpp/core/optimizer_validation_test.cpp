#include <cmath>

#include "core/paged_state.h"
#include "core/stochastic_rounding.h"
#include "support/expect_error.h"
#include "support/host_tensor.h"
#include "support/optimizer_tensors.h"

namespace qlora {
namespace {

/// Valid arguments: a list of one parameter of 300 elements, which is two blocks of 8-bit state.
class OptimizerValidation : public testing::Test {
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
  /// Of Lion, which has no second moment, and so none that could be wrong.
  void expect_lion_error(const std::string& text) {
    tensor.state.exp_avg_sq = {};
    expect_invalid("lion_step: " + text, [&] { lion_step(std::span(&tensor, 1), step, {}); });
  }
  void expect_lion8bit_error(const std::string& text) {
    tensor8bit.state.exp_avg_sq = tensor8bit.state.exp_avg_sq_absmax = {};
    expect_invalid("lion8bit_step: " + text,
                   [&] { lion_step(std::span(&tensor8bit, 1), step, {}); });
  }
  void expect_error_of_both(const std::string& text) {
    expect_step_error(text);
    expect_8bit_error(text);
  }
};

TEST_F(OptimizerValidation, TheUnspoiledArgumentsAreValid) {
  adamw_step(std::span(&tensor, 1), step, {});
  adamw_step(std::span(&tensor8bit, 1), step, {});
}
TEST_F(OptimizerValidation, AnEmptyListIsValid) {
  adamw_step({}, step, {});
  lion_step({}, step, {});
}

TEST_F(OptimizerValidation, LearningRateMustBeFiniteAndNotNegative) {
  step.lr = -0.5;
  expect_error_of_both("lr is -0.5, want a finite number of at least 0");
  step.lr = std::nan("");
  expect_error_of_both("lr is nan, want a finite number of at least 0");
  step.lr = HUGE_VAL;
  expect_error_of_both("lr is inf, want a finite number of at least 0");
}
TEST_F(OptimizerValidation, EpsMustBeFiniteAndNotNegative) {
  step.eps = -1.0;
  expect_error_of_both("eps is -1, want a finite number of at least 0");
}
TEST_F(OptimizerValidation, WeightDecayMustBeFiniteAndNotNegative) {
  step.weight_decay = -1.0;
  expect_error_of_both("weight_decay is -1, want a finite number of at least 0");
}
TEST_F(OptimizerValidation, BetasMustBeBelowOne) {
  step.beta1 = 1.0;
  expect_error_of_both("beta1 is 1, want 0 <= beta1 < 1");
  step.beta1 = 0.9;
  step.beta2 = -0.25;
  expect_error_of_both("beta2 is -0.25, want 0 <= beta2 < 1");
}
TEST_F(OptimizerValidation, StepsCountFromOne) {
  step.step = 0;
  expect_error_of_both("step is 0, want at least 1");
}
TEST_F(OptimizerValidation, NumbersAreCheckedWithAnEmptyListToo) {
  step.step = 0;
  expect_invalid("adamw_step: step is 0, want at least 1", [&] { adamw_step({}, step, {}); });
}

TEST_F(OptimizerValidation, NumbersInMemoryMustBeOneFloatOnTheDeviceOfTheParameters) {
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
TEST_F(OptimizerValidation, AStepCountMustBeOneFloat) {
  HostTensor half(DType::float16, {1});
  tensor.step_count = tensor8bit.step_count = half.view();
  expect_error_of_both("step_count is float16, want float32");
}

TEST_F(OptimizerValidation, StepRefusesAnIntegerParameter) {
  tensor.param.dtype = DType::int64;
  expect_step_error("param is int64, want float32, bfloat16 or float16");
}
TEST_F(OptimizerValidation, StepRefusesAParameterThatIsNotContiguous) {
  tensor.param.is_contiguous = false;
  expect_step_error("param of shape [3, 100] is not contiguous; pass param.contiguous()");
}
TEST_F(OptimizerValidation, StepRefusesAParameterOnAnotherDeviceThanTheFirst) {
  tensor.param.device = {DeviceType::cuda, 2};
  expect_step_error("param is on cuda:2, but the other tensors are on cpu");
}
TEST_F(OptimizerValidation, StepRefusesAnIntegerGradient) {
  tensor.grad.dtype = DType::uint8;
  expect_step_error("grad is uint8, want float32, bfloat16 or float16");
}
TEST_F(OptimizerValidation, StepRefusesAMissingGradient) {
  tensor.grad.is_present = false;
  expect_step_error("grad is missing");
}
TEST_F(OptimizerValidation, StepRefusesAGradientOfAnotherShape) {
  tensor.grad.shape = {300};
  expect_step_error("grad has shape [300], want [3, 100]");
}
TEST_F(OptimizerValidation, StepRefusesMomentsOfAnotherDtype) {
  tensor.state.exp_avg.dtype = DType::bfloat16;
  expect_step_error("exp_avg is bfloat16, want float32");
  tensor.state.exp_avg.dtype = DType::float32;
  tensor.state.exp_avg_sq.dtype = DType::float16;
  expect_step_error("exp_avg_sq is float16, want float32");
}
TEST_F(OptimizerValidation, StepRefusesMomentsOfTheWrongSize) {
  tensor.state.exp_avg.shape = {3, 99};
  expect_step_error("exp_avg of shape [3, 99] has 297 elements, want 300");
  tensor.state.exp_avg.shape = {300};
  tensor.state.exp_avg_sq.shape = {301};
  expect_step_error("exp_avg_sq of shape [301] has 301 elements, want 300");
}

TEST_F(OptimizerValidation, Step8bitRefusesAGradientOfAnotherShape) {
  tensor8bit.grad.shape = {300};
  expect_8bit_error("grad has shape [300], want [3, 100]");
}
TEST_F(OptimizerValidation, Step8bitRefusesCodesOfAnotherDtype) {
  tensor8bit.state.exp_avg.dtype = DType::float32;
  expect_8bit_error("exp_avg is float32, want uint8");
  tensor8bit.state.exp_avg.dtype = DType::uint8;
  tensor8bit.state.exp_avg_sq.dtype = DType::float32;
  expect_8bit_error("exp_avg_sq is float32, want uint8");
}
TEST_F(OptimizerValidation, Step8bitRefusesCodesOfTheWrongSize) {
  tensor8bit.state.exp_avg.shape = {299};
  expect_8bit_error("exp_avg of shape [299] has 299 elements, want 300");
  tensor8bit.state.exp_avg.shape = {300};
  tensor8bit.state.exp_avg_sq.shape = {301};
  expect_8bit_error("exp_avg_sq of shape [301] has 301 elements, want 300");
}
TEST_F(OptimizerValidation, Step8bitRefusesAbsmaxOfAnotherDtype) {
  tensor8bit.state.exp_avg_absmax.dtype = DType::uint8;
  expect_8bit_error("exp_avg_absmax is uint8, want float32");
  tensor8bit.state.exp_avg_absmax.dtype = DType::float32;
  tensor8bit.state.exp_avg_sq_absmax.dtype = DType::uint8;
  expect_8bit_error("exp_avg_sq_absmax is uint8, want float32");
}
TEST_F(OptimizerValidation, Step8bitRefusesAbsmaxOfTheWrongSize) {
  tensor8bit.state.exp_avg_absmax.shape = {1};
  expect_8bit_error("exp_avg_absmax of shape [1] has 1 elements, want 2");
  tensor8bit.state.exp_avg_absmax.shape = {2};
  tensor8bit.state.exp_avg_sq_absmax.shape = {3};
  expect_8bit_error("exp_avg_sq_absmax of shape [3] has 3 elements, want 2");
}

TEST_F(OptimizerValidation, LionWantsNoSecondMomentAndTakesNoNoticeOfOne) {
  lion_step(std::span(&tensor, 1), step, {});
  lion_step(std::span(&tensor8bit, 1), step, {});
  tensor.state.exp_avg_sq.dtype = DType::float16;
  tensor8bit.state.exp_avg_sq_absmax.shape = {1};
  lion_step(std::span(&tensor, 1), step, {});
  lion_step(std::span(&tensor8bit, 1), step, {});
  tensor.state.exp_avg_sq = tensor8bit.state.exp_avg_sq = {};
  lion_step(std::span(&tensor, 1), step, {});
  lion_step(std::span(&tensor8bit, 1), step, {});
}
TEST_F(OptimizerValidation, AdamWWantsASecondMoment) {
  tensor.state.exp_avg_sq = tensor8bit.state.exp_avg_sq = {};
  expect_error_of_both("exp_avg_sq is missing");
}
TEST_F(OptimizerValidation, LionNamesItself) {
  step.lr = -0.5;
  expect_lion_error("lr is -0.5, want a finite number of at least 0");
  expect_lion8bit_error("lr is -0.5, want a finite number of at least 0");
}
TEST_F(OptimizerValidation, LionRefusesAMomentThatIsWrong) {
  tensor.state.exp_avg.shape = {3, 99};
  expect_lion_error("exp_avg of shape [3, 99] has 297 elements, want 300");
  tensor.state.exp_avg.dtype = DType::bfloat16;
  expect_lion_error("exp_avg is bfloat16, want float32");
  tensor8bit.state.exp_avg_absmax.shape = {1};
  expect_lion8bit_error("exp_avg_absmax of shape [1] has 1 elements, want 2");
  tensor8bit.state.exp_avg.dtype = DType::float32;
  expect_lion8bit_error("exp_avg is float32, want uint8");
}
TEST_F(OptimizerValidation, AListHasStateOfOneKind) {
  const OptimizerTensor mixed[] = {tensor, tensor8bit};
  expect_invalid("adamw_step: exp_avg is uint8, want float32",
                 [&] { adamw_step(mixed, step, {}); });
}

TEST_F(OptimizerValidation, APieceBeginsAtABlock) {
  for (const std::int64_t first_element : {-256, 1, 255, 300}) {
    tensor.first_element = tensor8bit.first_element = first_element;
    expect_error_of_both(message("first_element is ", first_element, ", want a multiple of 256"));
  }
  tensor.first_element = tensor8bit.first_element = 512;
  adamw_step(std::span(&tensor, 1), step, {});
  adamw_step(std::span(&tensor8bit, 1), step, {});
}
TEST_F(OptimizerValidation, StochasticRoundingHasNumbersOf24Bits) {
  for (const std::int64_t number : {std::int64_t{-1}, RoundingStream::max_number + 1}) {
    tensor.number = tensor8bit.number = number;
    step.rounding_seed.reset();
    adamw_step(std::span(&tensor, 1), step, {});  // which asks for none
    step.rounding_seed = 1;
    expect_error_of_both(message("number is ", number, ", want 0 to 16777215"));
  }
  tensor.number = RoundingStream::max_number;
  adamw_step(std::span(&tensor, 1), step, {});
}
TEST_F(OptimizerValidation, StochasticRoundingIsNotForFloat16) {
  tensor.param.dtype = tensor8bit.param.dtype = DType::float16;
  adamw_step(std::span(&tensor, 1), step, {});
  step.rounding_seed = 1;
  expect_error_of_both(
      "param is float16, and stochastic rounding is for bfloat16 (float32 is not rounded)");
  expect_lion_error(
      "param is float16, and stochastic rounding is for bfloat16 (float32 is not rounded)");
}

// ---- state in pages

class PagedOptimizerValidation : public testing::Test {
 protected:
  Generator generator{8};
  HostTensor param = HostTensor::random(DType::bfloat16, {300}, generator);
  HostTensor grad = HostTensor::random(DType::bfloat16, {300}, generator);
  PagedState state{{}, OptimizerRule::lion, true, {.elements = 2048}};
  PagedTensor first{.param = param.view(), .grad = grad.view(), .step_count = {}};
  PagedTensor second = first;
  OptimizerStep step;

  PagedOptimizerValidation() { second.first_element = 512; }

  void expect_paged_error(const std::string& text) {
    const PagedTensor tensors[] = {first, second};
    expect_invalid("lion8bit_step: " + text,
                   [&] { paged_optimizer_step(state, tensors, step, {}); });
    expect_invalid("lion8bit_step: " + text,
                   [&] { validate_paged_optimizer_step(state, tensors, step); });
  }
  void expect_valid() {
    const PagedTensor tensors[] = {first, second};
    validate_paged_optimizer_step(state, tensors, step);
  }
};

TEST_F(PagedOptimizerValidation, TheUnspoiledArgumentsAreValid) {
  expect_valid();
  validate_paged_optimizer_step(state, {}, step);
  paged_optimizer_step(state, {}, step, {});
}
TEST_F(PagedOptimizerValidation, TensorsComeInTheOrderOfTheirState) {
  second.first_element = 256;  // the first one has 300
  expect_paged_error("first_element is 256, but the state before it goes on to element 300");
  first.first_element = 1024;
  second.first_element = 512;
  expect_paged_error("first_element is 512, but the state before it goes on to element 1324");
}
TEST_F(PagedOptimizerValidation, StateBeginsAtABlock) {
  second.first_element = 500;
  expect_paged_error("first_element is 500, want a multiple of 256");
  second.first_element = -256;
  expect_paged_error("first_element is -256, want a multiple of 256");
}
TEST_F(PagedOptimizerValidation, StateEndsWithThePages) {
  second.first_element = 1792;
  expect_paged_error(
      "the state of a param begins at element 1792 and has 300, but the pages have 2048");
  second.first_element = 1536;
  expect_valid();
}
TEST_F(PagedOptimizerValidation, AnEmptyParameterBeginsInAPageToo) {
  second.param.shape = second.grad.shape = {0};
  second.first_element = 1792;
  expect_valid();
  second.first_element = 2048;
  expect_paged_error(
      "the state of a param begins at element 2048 and has 0, but the pages have 2048");
}
TEST_F(PagedOptimizerValidation, ParametersAreCheckedAsWithoutPages) {
  second.grad.shape = {299};
  expect_paged_error("grad has shape [299], want [300]");
  second.grad.shape = {300};
  second.param.device = {DeviceType::cuda, 0};
  expect_paged_error("param is on cuda:0, but the other tensors are on cpu");
  second.param.device = {};
  HostTensor two(DType::float32, {2});
  second.step_count = two.view();
  expect_paged_error("step_count of shape [2] has 2 elements, want 1");
  second.step_count = {};
  step.rounding_seed = 1;
  second.number = -1;
  expect_paged_error("number is -1, want 0 to 16777215");
  step.beta2 = 1.0;
  expect_paged_error("beta2 is 1, want 0 <= beta2 < 1");
}

}  // namespace
}  // namespace qlora
