// lion8bit_step: a step in fp64 from the decoded state, the encoding of the new state, and
// closeness to 32-bit state.
#include <algorithm>
#include <cmath>

#include "core/operations.h"
#include "support/optimizer_tensors.h"
#include "support/stored_moment.h"

namespace qlora {
namespace {

using reference::LionElement;

constexpr LionElement::Numbers numbers = {1e-3, 0.9, 0.99, 1e-2};
constexpr std::int64_t block = StoredMoment::block;

OptimizerStep make_step() {
  OptimizerStep step;
  step.lr = numbers.lr;
  step.beta1 = numbers.beta1;
  step.beta2 = numbers.beta2;
  step.weight_decay = numbers.weight_decay;
  return step;
}

struct Trained {
  HostTensor param, grad;
  StoredMoment exp_avg;

  Trained(DType param_dtype, DType grad_dtype, std::int64_t count, Generator& generator)
      : param(HostTensor::random(param_dtype, {count}, generator, 0.1)),
        grad(grad_dtype, {count}),
        exp_avg(StoredMoment::first(count)) {}

  void draw_gradient(Generator& generator) {
    std::normal_distribution<double> normal(0.0, 0.01);
    for (std::int64_t i = 0; i < grad.numel(); ++i) grad.set(i, normal(generator));
  }

  OptimizerTensor view() {
    return with_8bit_state(param.view(), grad.view(), exp_avg.codes.view(), exp_avg.absmax.view());
  }

  void step(const OptimizerStep& step = make_step()) {
    const OptimizerTensor tensor = view();
    lion_step(std::span(&tensor, 1), step, {});
  }
};

class CpuLion8bitDtypes : public testing::TestWithParam<std::tuple<DType, DType>> {};

TEST_P(CpuLion8bitDtypes, AStepDecodesUpdatesInFp32AndEncodes) {
  Generator generator(61);
  int unsure = 0;
  for (const std::int64_t count : {1, 255, 256, 257, 1000}) {  // most with a short last block
    Trained trained(std::get<0>(GetParam()), std::get<1>(GetParam()), count, generator);
    for (int t = 1; t <= 6; ++t) {
      SCOPED_TRACE(message(count, " elements, step ", t));
      trained.draw_gradient(generator);
      std::vector<LionElement> want;
      std::vector<double> param, param_error;
      std::vector<double> largest(static_cast<std::size_t>((count + block - 1) / block));
      std::vector<double> error = largest;
      for (std::int64_t i = 0; i < count; ++i) {
        LionElement e{.param = trained.param[i], .exp_avg = trained.exp_avg.decode(i)};
        e.step(trained.grad[i], numbers);
        unsure += !e.is_sign_sure;
        want.push_back(e);
        param.push_back(e.param);
        param_error.push_back(e.param_error);
        const auto b = static_cast<std::size_t>(i / block);
        largest[b] = std::max(largest[b], std::fabs(e.exp_avg));
        error[b] = std::max(error[b], e.exp_avg_error);
      }
      trained.step();
      EXPECT_TRUE(is_rounded_from(trained.param, param, param_error));
      EXPECT_TRUE(is_rounded_from(trained.exp_avg.absmax, largest, error));
      for (std::int64_t i = 0; i < count; ++i) {
        trained.exp_avg.expect_nearest(i, want[static_cast<std::size_t>(i)].exp_avg,
                                       error[static_cast<std::size_t>(i / block)]);
      }
    }
  }
  EXPECT_LE(unsure, 3);  // of 10 thousand
}

INSTANTIATE_TEST_SUITE_P(Dtypes, CpuLion8bitDtypes, testing::Combine(float_dtypes, float_dtypes),
                         [](const auto& instance) {
                           return std::string(name_of(std::get<0>(instance.param))) + "Grad" +
                                  name_of(std::get<1>(instance.param));
                         });

class CpuLion8bit : public testing::TestWithParam<DType> {};

TEST_P(CpuLion8bit, IsAStepWith32BitStateFromTheDecodedOne) {
  Generator generator(62);
  constexpr std::int64_t count = 32 * 1024;
  Trained trained(GetParam(), GetParam(), count, generator);
  for (int t = 1; t <= 10; ++t) {
    trained.draw_gradient(generator);
    HostTensor param = trained.param, exp_avg(DType::float32, {count});
    for (std::int64_t i = 0; i < count; ++i) exp_avg.set(i, trained.exp_avg.decode(i));
    const OptimizerTensor tensor =
        with_32bit_state(param.view(), trained.grad.view(), exp_avg.view());
    lion_step(std::span(&tensor, 1), make_step(), {});
    trained.step();
    ASSERT_EQ(trained.param.bytes(), param.bytes()) << "step " << t;
  }
}

TEST_P(CpuLion8bit, StaysCloseTo32BitState) {
  // Each run goes on from its own state, from zero.
  Generator generator(63);
  constexpr std::int64_t count = 32 * 1024;
  Trained trained(DType::float32, GetParam(), count, generator);
  HostTensor param = trained.param;
  HostTensor exp_avg(DType::float32, {count}, std::vector<double>(count));
  constexpr int steps = 50;
  for (int t = 1; t <= steps; ++t) {
    trained.draw_gradient(generator);
    const OptimizerTensor tensor =
        with_32bit_state(param.view(), trained.grad.view(), exp_avg.view());
    lion_step(std::span(&tensor, 1), make_step(), {});
    trained.step();
  }
  double moment_error = 0.0, moment_size = 0.0, difference = 0.0;
  for (std::int64_t i = 0; i < count; ++i) {
    moment_error += std::fabs(trained.exp_avg.decode(i) - exp_avg[i]);
    moment_size += std::fabs(exp_avg[i]);
    difference += std::fabs(trained.param[i] - param[i]) / static_cast<double>(count);
  }
  // Codes are 0.014 of the absmax apart above a tenth of it, and the absmax of 256 normal numbers is
  // some 2.8 deviations: an encoding is off by 0.014 * 2.8 / sqrt(12) = 0.011 deviations. Errors of
  // 50 steps add up as they decay, by squares: to 0.05. Half of it again is allowed.
  EXPECT_LT(moment_error, 0.08 * moment_size);
  // A sign that turned is 2 lr. The error is 0.02 of a direction's deviation: 0.7 % of signs turn.
  EXPECT_LT(difference, 0.02 * steps * 2.0 * numbers.lr);
}

TEST_P(CpuLion8bit, ANaNGradientReachesItsBlockAndNoFurther) {
  Generator generator(64);
  Trained trained(GetParam(), GetParam(), 3 * block + 17, generator);
  trained.draw_gradient(generator);
  trained.grad.set(block + 5, std::nan(""));
  trained.step();
  for (std::int64_t i = 0; i < trained.param.numel(); ++i) {
    EXPECT_EQ(std::isnan(trained.param[i]), i == block + 5) << "element " << i;
  }
  trained.draw_gradient(generator);
  trained.step();  // the block's scale is lost, so by now all of it is NaN, in sight
  for (std::int64_t i = 0; i < trained.param.numel(); ++i) {
    EXPECT_EQ(std::isnan(trained.param[i]), i / block == 1) << "element " << i;
  }
}

TEST_P(CpuLion8bit, ZeroGradientsFromZeroStateStayZero) {
  Generator generator(65);
  Trained trained(GetParam(), GetParam(), 300, generator);
  trained.grad = HostTensor(GetParam(), {300}, std::vector<double>(300, 0.0));
  const HostTensor before = trained.param;
  OptimizerStep step = make_step();
  step.weight_decay = 0.0;
  trained.step(step);
  EXPECT_EQ(trained.param.bytes(), before.bytes());
  EXPECT_EQ(trained.exp_avg.codes.bytes(), std::vector<std::uint8_t>(300, 127));
  EXPECT_EQ(trained.exp_avg.absmax.values(), (std::vector<double>{0.0, 0.0}));
}

TEST_P(CpuLion8bit, ASubnormalMomentIsKept) {
  // Where 1 / absmax overflows.
  Generator generator(66);
  Trained trained(GetParam(), DType::float32, 600, generator);
  for (std::int64_t i = 0; i < 600; ++i) trained.grad.set(i, i % 2 ? 1e-38 : -1e-38);
  trained.step();
  for (std::int64_t i = 0; i < 600; ++i) {
    EXPECT_EQ(trained.exp_avg.codes.bytes()[static_cast<std::size_t>(i)], i % 2 ? 255 : 0);
  }
  EXPECT_NEAR(trained.exp_avg.absmax[2], 1e-40, 0x1p-148);
}

TEST_P(CpuLion8bit, AListIsStepsOfItsMembers) {
  Generator generator(67);
  std::vector<Trained> together;
  for (const std::int64_t count : {0, 1, 16384, 0, 16641, 257, 50001}) {
    together.emplace_back(GetParam(), DType::float32, count, generator);
    together.back().draw_gradient(generator);
  }
  std::vector<Trained> alone = together;
  std::vector<OptimizerTensor> list;
  for (Trained& trained : together) list.push_back(trained.view());
  lion_step(list, make_step(), {.num_threads = 3});
  for (std::size_t i = 0; i < alone.size(); ++i) {
    alone[i].step();
    EXPECT_EQ(together[i].param.bytes(), alone[i].param.bytes()) << "tensor " << i;
    EXPECT_EQ(together[i].exp_avg.codes.bytes(), alone[i].exp_avg.codes.bytes());
    EXPECT_EQ(together[i].exp_avg.absmax.bytes(), alone[i].exp_avg.absmax.bytes());
  }
}

INSTANTIATE_TEST_SUITE_P(Dtypes, CpuLion8bit, float_dtypes, test_name_of);

}  // namespace
}  // namespace qlora
