// lion_step against the formula in fp64, which carries its own bound on the rounding of an fp32
// evaluation.
#include <cmath>

#include "core/operations.h"
#include "support/host_tensor.h"
#include "support/optimizer_tensors.h"

namespace qlora {
namespace {

using reference::LionElement;

constexpr LionElement::Numbers defaults = {1e-3, 0.9, 0.99, 1e-2};

OptimizerStep make_step(const LionElement::Numbers& numbers) {
  OptimizerStep step;
  step.lr = numbers.lr;
  step.beta1 = numbers.beta1;
  step.beta2 = numbers.beta2;
  step.weight_decay = numbers.weight_decay;
  return step;
}

/// A parameter with its 32-bit state, and the same in fp64.
struct Trained {
  HostTensor param, grad, exp_avg;
  std::vector<LionElement> elements;
  int unsure = 0;

  Trained(DType param_dtype, DType grad_dtype, std::int64_t count, Generator& generator)
      : param(HostTensor::random(param_dtype, {count}, generator, 0.1)),
        grad(grad_dtype, {count}),
        exp_avg(DType::float32, {count}, std::vector<double>(static_cast<std::size_t>(count))) {
    for (const double value : param.values()) elements.push_back({.param = value});
  }

  OptimizerTensor view() { return with_32bit_state(param.view(), grad.view(), exp_avg.view()); }

  void draw_gradient(Generator& generator) {
    std::normal_distribution<double> normal(0.0, 0.01);
    for (std::int64_t i = 0; i < grad.numel(); ++i) grad.set(i, normal(generator));
  }

  void step(const OptimizerStep& step) {
    const OptimizerTensor tensor = view();
    lion_step(std::span(&tensor, 1), step, {});
  }

  /// Of the fp64 elements, by `sign` times the gradient, compared with what is stored.
  void expect_step(const LionElement::Numbers& numbers, double sign = 1.0) {
    std::vector<double> p, p_error, m, m_error;
    for (std::size_t i = 0; i < elements.size(); ++i) {
      LionElement& e = elements[i];
      e.step(sign * grad[static_cast<std::int64_t>(i)], numbers);
      unsure += !e.is_sign_sure;
      p.push_back(e.param), p_error.push_back(e.param_error);
      m.push_back(e.exp_avg), m_error.push_back(e.exp_avg_error);
    }
    EXPECT_TRUE(is_rounded_from(param, p, p_error)) << "param";
    EXPECT_TRUE(is_rounded_from(exp_avg, m, m_error)) << "exp_avg";
  }

  /// Lets the reference go on from what was stored, so that the next comparison is of one step
  /// alone.
  void adopt_stored_state() {
    for (std::size_t i = 0; i < elements.size(); ++i) {
      const auto at = static_cast<std::int64_t>(i);
      elements[i] = {.param = param[at], .exp_avg = exp_avg[at]};
    }
  }
};

class CpuLionDtypes : public testing::TestWithParam<std::tuple<DType, DType>> {};

TEST_P(CpuLionDtypes, EveryStepIsTheFormulaRoundedOnce) {
  Generator generator(51);
  Trained trained(std::get<0>(GetParam()), std::get<1>(GetParam()), 517, generator);
  for (int t = 1; t <= 25; ++t) {
    SCOPED_TRACE(t);
    trained.draw_gradient(generator);
    trained.step(make_step(defaults));
    trained.expect_step(defaults);
    trained.adopt_stored_state();
  }
  EXPECT_LE(trained.unsure, 3);  // of 13 thousand: a direction within 2^-22 or so of its terms
}

INSTANTIATE_TEST_SUITE_P(Dtypes, CpuLionDtypes, testing::Combine(float_dtypes, float_dtypes),
                         [](const auto& instance) {
                           return std::string(name_of(std::get<0>(instance.param))) + "Grad" +
                                  name_of(std::get<1>(instance.param));
                         });

TEST(CpuLion, OtherNumbersFollowTheFormulaToo) {
  for (const LionElement::Numbers& numbers : {LionElement::Numbers{0.0, 0.9, 0.99, 0.1},
                                              {1e-2, 0.0, 0.0, 0.0},
                                              {1e-1, 0.5, 0.9, 0.5},
                                              {2e-4, 0.95, 0.98, 0.0}}) {
    Generator generator(52);
    Trained trained(DType::float32, DType::float32, 100, generator);
    for (int t = 1; t <= 10; ++t) {
      trained.draw_gradient(generator);
      trained.step(make_step(numbers));
      trained.expect_step(numbers);
      trained.adopt_stored_state();
    }
    EXPECT_LE(trained.unsure, 1);
  }
}

TEST(CpuLion, MaximizeIsAStepWithTheNegatedGradient) {
  Generator generator(53);
  Trained trained(DType::float32, DType::bfloat16, 100, generator);
  OptimizerStep step = make_step(defaults);
  step.maximize = true;
  for (int t = 1; t <= 3; ++t) {
    trained.draw_gradient(generator);
    trained.step(step);
    trained.expect_step(defaults, -1.0);
    trained.adopt_stored_state();
  }
  EXPECT_EQ(trained.unsure, 0);
}

TEST(CpuLion, TheNumberOfAStepChangesNothing) {
  Generator generator(54);
  Trained first(DType::float32, DType::float32, 100, generator);
  first.draw_gradient(generator);
  Trained other = first;
  OptimizerStep step = make_step(defaults);
  first.step(step);
  step.step = 1000;
  step.eps = 0.5;
  other.step(step);
  EXPECT_EQ(first.param.bytes(), other.param.bytes());
  EXPECT_EQ(first.exp_avg.bytes(), other.exp_avg.bytes());
}

TEST(CpuLion, WhereTheDirectionIsZeroAParameterOnlyDecays) {
  Generator generator(55);
  // 0.5 m + 0.5 g is 0 for both zeros, and for opposite numbers.
  const std::vector<double> moments = {0.0, -0.0, 0.0, -0.0, 0.25, -3.0};
  const std::vector<double> grads = {0.0, 0.0, -0.0, -0.0, -0.25, 3.0};
  for (const double weight_decay : {0.0, 1.0}) {
    for (std::int64_t count : {6, 48}) {  // less than a register, and registers
      Trained trained(DType::float32, DType::float32, count, generator);
      for (std::int64_t i = 0; i < count; ++i) {
        trained.exp_avg.set(i, moments[static_cast<std::size_t>(i % 6)]);
        trained.grad.set(i, grads[static_cast<std::size_t>(i % 6)]);
      }
      const HostTensor before = trained.param;
      trained.step(make_step({0.5, 0.5, 0.75, weight_decay}));
      for (std::int64_t i = 0; i < count; ++i) {
        EXPECT_EQ(trained.param[i], before[i] * (1.0 - 0.5 * weight_decay)) << "element " << i;
      }
    }
  }
}

TEST(CpuLion, TheSizeOfAGradientIsNoMatter) {
  Generator generator(56);
  Trained trained(DType::float32, DType::float32, 40, generator);
  const double sizes[] = {1e-45, 1e-30, 1.0, 1e30, HUGE_VAL};
  const HostTensor before = trained.param;
  for (std::int64_t i = 0; i < 40; ++i) trained.grad.set(i, (i % 2 ? -1 : 1) * sizes[i % 5]);
  trained.step(make_step({0x1p-3, 0.0, 0.5, 0.0}));
  for (std::int64_t i = 0; i < 40; ++i) {
    const double want = before[i] - (i % 2 ? -0x1p-3 : 0x1p-3);
    EXPECT_EQ(trained.param[i], reference::round_to(reference::float32_format, want));
  }
}

TEST(CpuLion, AListIsStepsOfItsMembers) {
  Generator generator(57);
  // Sizes around and beyond the backend's pieces of 16384, with empty ones between.
  std::vector<Trained> together;
  for (const std::int64_t count : {0, 1, 16384, 0, 16385, 3, 50001, 0}) {
    together.emplace_back(DType::bfloat16, DType::float32, count, generator);
    together.back().draw_gradient(generator);
  }
  std::vector<Trained> alone = together;
  std::vector<OptimizerTensor> list;
  for (Trained& trained : together) list.push_back(trained.view());
  lion_step(list, make_step(defaults), {.num_threads = 3});
  for (std::size_t i = 0; i < alone.size(); ++i) {
    alone[i].step(make_step(defaults));
    EXPECT_EQ(together[i].param.bytes(), alone[i].param.bytes()) << "tensor " << i;
    EXPECT_EQ(together[i].exp_avg.bytes(), alone[i].exp_avg.bytes()) << "tensor " << i;
  }
}

TEST(CpuLion, ANaNGradientReachesItsElementAlone) {
  Generator generator(58);
  Trained trained(DType::float32, DType::float32, 9, generator);
  trained.draw_gradient(generator);
  trained.grad.set(4, std::nan(""));
  trained.step(make_step(defaults));
  for (std::int64_t i = 0; i < 9; ++i) {
    EXPECT_EQ(std::isnan(trained.param[i]), i == 4) << "element " << i;
    EXPECT_EQ(std::isnan(trained.exp_avg[i]), i == 4) << "element " << i;
  }
}

}  // namespace
}  // namespace qlora
