// The numbers of a step that are in memory: learning rate, gradient scale, found_inf, step counts.
#include "core/operations.h"
#include "format/nf4_layout.h"
#include "support/host_tensor.h"
#include "support/optimizer_tensors.h"

namespace qlora {
namespace {

constexpr std::int64_t count = 16384 + 300;  // two of the backend's pieces

/// One parameter with either kind of state.
struct Trained {
  HostTensor param, grad, exp_avg, exp_avg_sq, absmax, absmax_sq;
  HostTensor step_count = HostTensor(DType::float32, {1}, {6.0});

  Trained(bool is_8bit, Generator& generator)
      : param(HostTensor::random(DType::bfloat16, {count}, generator)),
        grad(HostTensor::random(DType::float32, {count}, generator)),
        exp_avg(zeros(is_8bit ? DType::uint8 : DType::float32, count)),
        exp_avg_sq(exp_avg),
        absmax(zeros(DType::float32, ceil_divide(count, state_block_size))),
        absmax_sq(absmax) {}

  static HostTensor zeros(DType dtype, std::int64_t size) {
    return {dtype, {size}, std::vector<double>(static_cast<std::size_t>(size))};
  }

  bool operator==(const Trained& other) const {
    return param.bytes() == other.param.bytes() && exp_avg.bytes() == other.exp_avg.bytes() &&
           exp_avg_sq.bytes() == other.exp_avg_sq.bytes() &&
           absmax.bytes() == other.absmax.bytes() && absmax_sq.bytes() == other.absmax_sq.bytes();
  }
};

class CpuAdamWNumbers : public testing::TestWithParam<bool> {
 protected:
  const bool is_8bit = GetParam();
  Generator generator{61};
  Trained trained{is_8bit, generator};

  void run(Trained& t, const OptimizerStep& step, bool is_counted = false) {
    const TensorView step_count = is_counted ? t.step_count.view() : TensorView{};
    if (is_8bit) {
      const OptimizerTensor tensor =
          with_8bit_state(t.param.view(), t.grad.view(), t.exp_avg.view(), t.absmax.view(),
                          t.exp_avg_sq.view(), t.absmax_sq.view(), step_count);
      adamw_step(std::span(&tensor, 1), step, {.num_threads = 2});
    } else {
      const OptimizerTensor tensor = with_32bit_state(
          t.param.view(), t.grad.view(), t.exp_avg.view(), t.exp_avg_sq.view(), step_count);
      adamw_step(std::span(&tensor, 1), step, {.num_threads = 2});
    }
  }
};

TEST_P(CpuAdamWNumbers, ALearningRateInMemoryTakesThePlaceOfTheOther) {
  Trained expected = trained;
  HostTensor lr(DType::float32, {1}, {0.25});
  OptimizerStep step;
  step.lr = 0.25;
  run(expected, step);
  step.lr = 7.0;
  step.lr_tensor = lr.view();
  run(trained, step);
  EXPECT_TRUE(trained == expected);
}

TEST_P(CpuAdamWNumbers, AScaleOfTheGradientsIsUndone) {
  Trained expected = trained;
  HostTensor scale(DType::float32, {1}, {0x1p10});
  for (std::int64_t i = 0; i < count; ++i) trained.grad.set(i, 0x1p10 * expected.grad[i]);
  OptimizerStep step;
  step.maximize = true;
  run(expected, step);
  step.grad_scale = scale.view();
  run(trained, step);
  EXPECT_TRUE(trained == expected);
}

TEST_P(CpuAdamWNumbers, AScaleIsUndoneByItsRoundedReciprocal) {
  Trained expected = trained;
  HostTensor scale(DType::float32, {1}, {3.0});
  const double reciprocal = reference::round_to(reference::float32_format, 1.0 / 3.0);
  for (std::int64_t i = 0; i < count; ++i) expected.grad.set(i, reciprocal * trained.grad[i]);
  OptimizerStep step;
  run(expected, step);
  step.grad_scale = scale.view();
  run(trained, step);
  EXPECT_TRUE(trained == expected);
}

TEST_P(CpuAdamWNumbers, ACountOfStepsTakesThePlaceOfTheOtherAndGoesOn) {
  Trained expected = trained;
  OptimizerStep step;
  step.step = 7;
  run(expected, step);
  step.step = 1;
  run(trained, step, true);
  EXPECT_TRUE(trained == expected);
  EXPECT_EQ(trained.step_count[0], 7.0);
  step.step = 8;
  run(expected, step);
  run(trained, step, true);
  EXPECT_TRUE(trained == expected);
  EXPECT_EQ(trained.step_count[0], 8.0);
}

TEST_P(CpuAdamWNumbers, WhereInfWasFoundNothingIsDone) {
  const Trained before = trained;
  HostTensor found_inf(DType::float32, {1}, {1.0});
  OptimizerStep step;
  step.found_inf = found_inf.view();
  run(trained, step, true);
  EXPECT_TRUE(trained == before);
  EXPECT_EQ(trained.step_count[0], 6.0);
  found_inf.set(0, 0.0);
  run(trained, step, true);
  EXPECT_FALSE(trained == before);
  EXPECT_EQ(trained.step_count[0], 7.0);
}

INSTANTIATE_TEST_SUITE_P(State, CpuAdamWNumbers, testing::Bool(), [](const auto& instance) {
  return instance.param ? "In8Bits" : "In32Bits";
});

}  // namespace
}  // namespace qlora
