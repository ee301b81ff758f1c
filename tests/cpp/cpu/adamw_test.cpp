// adamw_step against the formula in fp64, which carries its own bound on the rounding of an fp32
// evaluation.
#include <cmath>

#include "core/operations.h"
#include "support/host_tensor.h"
#include "support/optimizer_tensors.h"

namespace qlora {
namespace {

using reference::AdamWElement;

constexpr AdamWElement::Numbers defaults = {1e-3, 0.9, 0.999, 1e-8, 1e-2};

OptimizerStep make_step(const AdamWElement::Numbers& numbers, std::int64_t t) {
  return {{.lr = numbers.lr,
           .beta1 = numbers.beta1,
           .beta2 = numbers.beta2,
           .eps = numbers.eps,
           .weight_decay = numbers.weight_decay,
           .step = t,
           .maximize = false},
          {},
          {},
          {}};
}

/// A parameter with its 32-bit state, and the same in fp64.
struct Trained {
  HostTensor param, grad, exp_avg, exp_avg_sq;
  std::vector<AdamWElement> elements;

  Trained(DType param_dtype, DType grad_dtype, std::int64_t count, Generator& generator)
      : param(HostTensor::random(param_dtype, {count}, generator, 0.1)),
        grad(grad_dtype, {count}),
        exp_avg(DType::float32, {count}, std::vector<double>(static_cast<std::size_t>(count))),
        exp_avg_sq(exp_avg) {
    for (const double value : param.values()) elements.push_back({.param = value});
  }

  OptimizerTensor view() {
    return with_32bit_state(param.view(), grad.view(), exp_avg.view(), exp_avg_sq.view());
  }

  void draw_gradient(Generator& generator, double sign = 1.0) {
    std::normal_distribution<double> normal(0.0, 0.01);
    for (std::int64_t i = 0; i < grad.numel(); ++i) grad.set(i, sign * normal(generator));
  }

  void step_reference(const AdamWElement::Numbers& numbers, std::int64_t t, double sign = 1.0) {
    for (std::size_t i = 0; i < elements.size(); ++i) {
      elements[i].step(sign * grad[static_cast<std::int64_t>(i)], numbers, t);
    }
  }

  void expect_close() const {
    std::vector<double> p, p_error, m, m_error, v, v_error;
    for (const AdamWElement& e : elements) {
      p.push_back(e.param), p_error.push_back(e.param_error);
      m.push_back(e.exp_avg), m_error.push_back(e.exp_avg_error);
      v.push_back(e.exp_avg_sq), v_error.push_back(e.exp_avg_sq_error);
    }
    EXPECT_TRUE(is_rounded_from(param, p, p_error)) << "param";
    EXPECT_TRUE(is_rounded_from(exp_avg, m, m_error)) << "exp_avg";
    EXPECT_TRUE(is_rounded_from(exp_avg_sq, v, v_error)) << "exp_avg_sq";
  }

  /// Lets the reference go on from what was stored, so that the next comparison is of one step
  /// alone.
  void adopt_stored_state() {
    for (std::size_t i = 0; i < elements.size(); ++i) {
      const auto at = static_cast<std::int64_t>(i);
      elements[i] = {.param = param[at], .exp_avg = exp_avg[at], .exp_avg_sq = exp_avg_sq[at]};
    }
  }
};

class CpuAdamWDtypes : public testing::TestWithParam<std::tuple<DType, DType>> {
 protected:
  const DType param_dtype = std::get<0>(GetParam()), grad_dtype = std::get<1>(GetParam());
  Generator generator{16};
};

TEST_P(CpuAdamWDtypes, EveryStepIsTheFormulaRoundedOnce) {
  Trained trained(param_dtype, grad_dtype, 517, generator);
  for (std::int64_t t = 1; t <= 25; ++t) {
    SCOPED_TRACE(t);
    trained.draw_gradient(generator);
    const OptimizerTensor tensor = trained.view();
    adamw_step(std::span(&tensor, 1), make_step(defaults, t), {});
    trained.step_reference(defaults, t);
    trained.expect_close();
    trained.adopt_stored_state();
  }
}

INSTANTIATE_TEST_SUITE_P(Dtypes, CpuAdamWDtypes, testing::Combine(float_dtypes, float_dtypes),
                         [](const auto& instance) {
                           return std::string(name_of(std::get<0>(instance.param))) + "Grad" +
                                  name_of(std::get<1>(instance.param));
                         });

TEST(CpuAdamW, AThousandStepsStayWithinFp32Rounding) {
  // 1 - lr * weight_decay = 1 - 2^-17 is an fp32: else its rounding, the same in each step, would
  // be most of the drift.
  constexpr AdamWElement::Numbers numbers = {0x1p-10, 0.9, 0.999, 1e-8, 0x1p-7};
  Generator generator(17);
  Trained trained(DType::float32, DType::float32, 64, generator);
  for (std::int64_t t = 1; t <= 1000; ++t) {
    trained.draw_gradient(generator);
    const OptimizerTensor tensor = trained.view();
    adamw_step(std::span(&tensor, 1), make_step(numbers, t), {});
    trained.step_reference(numbers, t);
  }
  trained.expect_close();
  // The bound takes every rounding at its worst. They are as often up as down, so the true drift is
  // far smaller.
  for (std::int64_t i = 0; i < trained.param.numel(); ++i) {
    const double want = trained.elements[static_cast<std::size_t>(i)].param;
    EXPECT_NEAR(trained.param[i], want, 1e-6 + 1e-5 * std::fabs(want)) << "element " << i;
  }
}

TEST(CpuAdamW, OtherNumbersFollowTheFormulaToo) {
  for (const AdamWElement::Numbers& numbers : {AdamWElement::Numbers{0.0, 0.9, 0.999, 1e-8, 0.1},
                                               {1e-2, 0.0, 0.0, 1e-8, 0.0},
                                               {1e-1, 0.5, 0.9, 1e-3, 0.5},
                                               {2e-4, 0.9, 0.95, 0.0, 0.0}}) {
    Generator generator(18);
    Trained trained(DType::float32, DType::float32, 100, generator);
    for (std::int64_t t = 1; t <= 10; ++t) {
      trained.draw_gradient(generator);
      const OptimizerTensor tensor = trained.view();
      adamw_step(std::span(&tensor, 1), make_step(numbers, t), {});
      trained.step_reference(numbers, t);
      trained.expect_close();
      trained.adopt_stored_state();
    }
  }
}

TEST(CpuAdamW, MaximizeIsAStepWithTheNegatedGradient) {
  Generator generator(19);
  Trained trained(DType::float32, DType::bfloat16, 100, generator);
  trained.draw_gradient(generator);
  OptimizerStep step = make_step(defaults, 1);
  step.maximize = true;
  const OptimizerTensor tensor = trained.view();
  adamw_step(std::span(&tensor, 1), step, {});
  trained.step_reference(defaults, 1, -1.0);
  trained.expect_close();
}

TEST(CpuAdamW, AListIsStepsOfItsMembers) {
  Generator generator(20);
  // Sizes around and beyond the backend's pieces of 16384, with empty ones between.
  std::vector<Trained> together, alone;
  for (const std::int64_t count : {0, 1, 16384, 0, 16385, 3, 50001, 0}) {
    together.emplace_back(DType::bfloat16, DType::float32, count, generator);
    together.back().draw_gradient(generator);
  }
  alone = together;
  std::vector<OptimizerTensor> list;
  for (Trained& trained : together) list.push_back(trained.view());
  adamw_step(list, make_step(defaults, 1), {.num_threads = 3});
  for (std::size_t i = 0; i < alone.size(); ++i) {
    const OptimizerTensor tensor = alone[i].view();
    adamw_step(std::span(&tensor, 1), make_step(defaults, 1), {});
    EXPECT_EQ(together[i].param.bytes(), alone[i].param.bytes()) << "tensor " << i;
    EXPECT_EQ(together[i].exp_avg.bytes(), alone[i].exp_avg.bytes()) << "tensor " << i;
    EXPECT_EQ(together[i].exp_avg_sq.bytes(), alone[i].exp_avg_sq.bytes()) << "tensor " << i;
  }
}

TEST(CpuAdamW, ANaNGradientReachesItsElementAlone) {
  Generator generator(21);
  Trained trained(DType::float32, DType::float32, 9, generator);
  trained.draw_gradient(generator);
  trained.grad.set(4, std::nan(""));
  const OptimizerTensor tensor = trained.view();
  adamw_step(std::span(&tensor, 1), make_step(defaults, 1), {});
  for (std::int64_t i = 0; i < 9; ++i) EXPECT_EQ(std::isnan(trained.param[i]), i == 4);
}

}  // namespace
}  // namespace qlora
