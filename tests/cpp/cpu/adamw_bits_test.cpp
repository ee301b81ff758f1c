// Both kinds of AdamW step give the bits of the scalar kernels, in the set that runs.
#include <cmath>
#include <cstring>

#include "cpu/instruction_sets.h"
#include "support/host_tensor.h"
#include "support/optimizer_tensors.h"

namespace qlora {
namespace {

/// `count` values over many magnitudes, both signs, zeros and subnormals.
HostTensor spread(DType dtype, std::int64_t count, Generator& generator) {
  HostTensor tensor(dtype, {count});
  std::normal_distribution<double> normal;
  std::uniform_real_distribution<double> exponent(-24.0, 4.0);
  for (std::int64_t i = 0; i < count; ++i) {
    tensor.set(i, i % 17 == 0 ? 0.0 : normal(generator) * std::exp2(exponent(generator)));
  }
  return tensor;
}

HostTensor zeros(DType dtype, std::int64_t count) {
  return {dtype, {count}, std::vector<double>(static_cast<std::size_t>(count))};
}

/// NaN of any sign and payload counts as the same number, as the order of operands decides it.
testing::AssertionResult same_numbers(const HostTensor& a, const HostTensor& b) {
  for (std::int64_t i = 0; i < a.numel(); ++i) {
    if (std::isnan(a[i]) && std::isnan(b[i])) continue;
    if (a[i] != b[i] || std::signbit(a[i]) != std::signbit(b[i])) {
      return testing::AssertionFailure() << "element " << i << ": " << a[i] << ", want " << b[i];
    }
  }
  return testing::AssertionSuccess();
}

class CpuAdamWBits : public testing::TestWithParam<std::tuple<DType, DType>> {
 protected:
  const DType param_dtype = std::get<0>(GetParam()), grad_dtype = std::get<1>(GetParam());
  Generator generator{41};
};

OptimizerStep step_number(std::int64_t t) {
  OptimizerStep step;
  step.step = t;
  step.maximize = t % 2 == 0;
  if (t % 3 == 0) step.beta2 = 0.95, step.eps = 0.0;
  return step;
}

TEST_P(CpuAdamWBits, OfA32BitStepAreTheScalarOnes) {
  struct State {
    HostTensor param, exp_avg, exp_avg_sq;
  };
  for (const std::int64_t count : {1, 7, 8, 15, 16, 33, 1000}) {
    const HostTensor param = spread(param_dtype, count, generator);
    State ours{param, zeros(DType::float32, count), zeros(DType::float32, count)};
    State wanted = ours;
    for (std::int64_t t = 1; t <= 12; ++t) {
      HostTensor grad = spread(grad_dtype, count, generator);
      // Inf: a second moment that overflows leaves an infinite denominator, and NaN its element.
      if (t == 9) grad.set(count / 2, grad_dtype == DType::float16 ? 6e4 : 3e19);
      if (t == 11) grad.set(count / 3, std::nan(""));
      const AdamWRule rule(step_number(t));
      const auto run = [&](const CpuKernels& set, State& s) {
        // In two ranges, as threads do it.
        const OptimizerTensor tensor =
            with_32bit_state(s.param.view(), grad.view(), s.exp_avg.view(), s.exp_avg_sq.view());
        set.adamw_step(tensor, rule, nullptr, 0, count / 2);
        set.adamw_step(tensor, rule, nullptr, count / 2, count);
      };
      run(kernels(), ours);
      run(scalar_kernels(), wanted);
      ASSERT_TRUE(same_numbers(ours.param, wanted.param)) << "step " << t;
      ASSERT_TRUE(same_numbers(ours.exp_avg, wanted.exp_avg)) << "step " << t;
      ASSERT_TRUE(same_numbers(ours.exp_avg_sq, wanted.exp_avg_sq)) << "step " << t;
    }
  }
}

TEST_P(CpuAdamWBits, OfAn8BitStepAreTheScalarOnes) {
  struct State {
    HostTensor param, exp_avg, absmax, exp_avg_sq, absmax_sq;
  };
  for (const std::int64_t count : {1, 255, 256, 257, 1024, 1500}) {
    const std::int64_t blocks = ceil_divide(count, state_block_size);
    State ours{spread(param_dtype, count, generator), zeros(DType::uint8, count),
               zeros(DType::float32, blocks), zeros(DType::uint8, count),
               zeros(DType::float32, blocks)};
    State wanted = ours;
    for (std::int64_t t = 1; t <= 12; ++t) {
      HostTensor grad = spread(grad_dtype, count, generator);
      // A block of zeros, one of subnormal second moments, and at last a NaN.
      for (std::int64_t i = 256; t <= 3 && i < std::min<std::int64_t>(count, 512); ++i) {
        grad.set(i, 0.0);
      }
      for (std::int64_t i = 512; i < std::min<std::int64_t>(count, 768); ++i) {
        grad.set(i, i % 3 == 0 ? 0.0 : 1e-20);
      }
      if (t == 11) grad.set(count / 3, std::nan(""));
      const AdamWRule rule(step_number(t));
      const auto run = [&](const CpuKernels& set, State& s) {
        const OptimizerTensor tensor =
            with_8bit_state(s.param.view(), grad.view(), s.exp_avg.view(), s.absmax.view(),
                            s.exp_avg_sq.view(), s.absmax_sq.view());
        set.adamw8bit_step(tensor, rule, nullptr, 0, blocks / 2);
        set.adamw8bit_step(tensor, rule, nullptr, blocks / 2, blocks);
      };
      run(kernels(), ours);
      run(scalar_kernels(), wanted);
      ASSERT_TRUE(same_numbers(ours.param, wanted.param)) << "step " << t;
      ASSERT_TRUE(same_numbers(ours.absmax, wanted.absmax)) << "step " << t;
      ASSERT_TRUE(same_numbers(ours.absmax_sq, wanted.absmax_sq)) << "step " << t;
      for (std::int64_t i = 0; i < count; ++i) {
        const std::int64_t block = i / state_block_size;
        if (!std::isnan(wanted.absmax[block])) {  // where it is NaN every code stands for NaN
          ASSERT_EQ(ours.exp_avg[i], wanted.exp_avg[i]) << "element " << i << ", step " << t;
        }
        if (!std::isnan(wanted.absmax_sq[block])) {
          ASSERT_EQ(ours.exp_avg_sq[i], wanted.exp_avg_sq[i]) << "element " << i << ", step " << t;
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Dtypes, CpuAdamWBits, testing::Combine(float_dtypes, float_dtypes),
                         [](const auto& instance) {
                           return std::string(name_of(std::get<0>(instance.param))) + "Grad" +
                                  name_of(std::get<1>(instance.param));
                         });

}  // namespace
}  // namespace qlora
