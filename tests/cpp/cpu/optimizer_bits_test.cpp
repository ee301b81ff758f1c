// Every kind of step gives the bits of the scalar kernels, in the set that runs.
#include <cmath>
#include <optional>

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
    const double zero = i % 2 == 0 ? 0.0 : -0.0;
    tensor.set(i, i % 17 == 0 ? zero : normal(generator) * std::exp2(exponent(generator)));
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

OptimizerStep step_number(std::int64_t t) {
  OptimizerStep step;
  step.step = t;
  step.maximize = t % 2 == 0;
  if (t % 3 == 0) step.beta2 = 0.95, step.eps = 0.0;
  return step;
}

/// The kernels of a rule.
void run_32bit(const CpuKernels& set, const OptimizerTensor& tensor, const AdamWRule& rule,
               const RoundingStream* rounding, std::int64_t begin, std::int64_t end) {
  set.adamw_step(tensor, rule, rounding, begin, end);
}
void run_32bit(const CpuKernels& set, const OptimizerTensor& tensor, const LionRule& rule,
               const RoundingStream* rounding, std::int64_t begin, std::int64_t end) {
  set.lion_step(tensor, rule, rounding, begin, end);
}
void run_8bit(const CpuKernels& set, const OptimizerTensor& tensor, const AdamWRule& rule,
              const RoundingStream* rounding, std::int64_t begin, std::int64_t end) {
  set.adamw8bit_step(tensor, rule, rounding, begin, end);
}
void run_8bit(const CpuKernels& set, const OptimizerTensor& tensor, const LionRule& rule,
              const RoundingStream* rounding, std::int64_t begin, std::int64_t end) {
  set.lion8bit_step(tensor, rule, rounding, begin, end);
}

template <typename Rule>
class Bits {
 public:
  Bits(DType param_dtype, DType grad_dtype, bool is_random)
      : param_dtype_(param_dtype), grad_dtype_(grad_dtype), is_random_(is_random) {}

  void compare_32bit_steps() {
    struct State {
      HostTensor param, exp_avg, exp_avg_sq;
    };
    for (const std::int64_t count : {1, 7, 8, 15, 16, 33, 1000}) {
      const HostTensor param = spread(param_dtype_, count, generator_);
      State ours{param, zeros(DType::float32, count), zeros(DType::float32, count)};
      State wanted = ours;
      for (std::int64_t t = 1; t <= 12; ++t) {
        HostTensor grad = spread(grad_dtype_, count, generator_);
        // Inf: a second moment that overflows leaves an infinite denominator, and NaN its element.
        if (t == 9) grad.set(count / 2, grad_dtype_ == DType::float16 ? 6e4 : 3e19);
        if (t == 11) grad.set(count / 3, std::nan(""));
        // In three ranges that begin anywhere.
        const std::int64_t cuts[] = {0, std::min(t * 41 % 300, count / 2), count * 3 / 4, count};
        const auto run = [&](const CpuKernels& set, State& s) {
          const OptimizerTensor tensor =
              with_32bit_state(s.param.view(), grad.view(), s.exp_avg.view(), s.exp_avg_sq.view());
          const RoundingStream stream = stream_of(t);
          for (int range = 0; range < 3; ++range) {
            run_32bit(set, tensor, Rule(step_number(t)), is_random_ ? &stream : nullptr,
                      cuts[range], cuts[range + 1]);
          }
        };
        run(kernels(), ours);
        run(scalar_kernels(), wanted);
        ASSERT_TRUE(same_numbers(ours.param, wanted.param)) << "step " << t;
        ASSERT_TRUE(same_numbers(ours.exp_avg, wanted.exp_avg)) << "step " << t;
        ASSERT_TRUE(same_numbers(ours.exp_avg_sq, wanted.exp_avg_sq)) << "step " << t;
      }
    }
  }

  void compare_8bit_steps() {
    struct State {
      HostTensor param, exp_avg, absmax, exp_avg_sq, absmax_sq;
    };
    for (const std::int64_t count : {1, 255, 256, 257, 1024, 1500}) {
      const std::int64_t blocks = ceil_divide(count, state_block_size);
      State ours{spread(param_dtype_, count, generator_), zeros(DType::uint8, count),
                 zeros(DType::float32, blocks), zeros(DType::uint8, count),
                 zeros(DType::float32, blocks)};
      State wanted = ours;
      for (std::int64_t t = 1; t <= 12; ++t) {
        HostTensor grad = spread(grad_dtype_, count, generator_);
        // A block of zeros, one of subnormal second moments, and at last a NaN.
        for (std::int64_t i = 256; t <= 3 && i < std::min<std::int64_t>(count, 512); ++i) {
          grad.set(i, 0.0);
        }
        for (std::int64_t i = 512; i < std::min<std::int64_t>(count, 768); ++i) {
          grad.set(i, i % 3 == 0 ? 0.0 : 1e-20);
        }
        if (t == 11) grad.set(count / 3, std::nan(""));
        const auto run = [&](const CpuKernels& set, State& s) {
          const OptimizerTensor tensor =
              with_8bit_state(s.param.view(), grad.view(), s.exp_avg.view(), s.absmax.view(),
                              s.exp_avg_sq.view(), s.absmax_sq.view());
          const RoundingStream stream = stream_of(t);
          const RoundingStream* const rounding = is_random_ ? &stream : nullptr;
          run_8bit(set, tensor, Rule(step_number(t)), rounding, 0, blocks / 2);
          run_8bit(set, tensor, Rule(step_number(t)), rounding, blocks / 2, blocks);
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
            ASSERT_EQ(ours.exp_avg_sq[i], wanted.exp_avg_sq[i])
                << "element " << i << ", step " << t;
          }
        }
      }
    }
  }

 private:
  /// Its lower 32 bits of the counter soon wrap around, within what a register holds of them.
  static RoundingStream stream_of(std::int64_t t) {
    return {.seed = 0x123456789abcdef0u,
            .first_counter = RoundingStream::counter_of(77, 8 * ((std::int64_t{1} << 32) - 11)),
            .step = static_cast<std::uint32_t>(t)};
  }

  const DType param_dtype_, grad_dtype_;
  const bool is_random_;
  Generator generator_{41};
};

class CpuOptimizerBits : public testing::TestWithParam<std::tuple<DType, DType, bool>> {
 protected:
  template <typename Rule>
  Bits<Rule> bits() const {
    const auto [param_dtype, grad_dtype, is_random] = GetParam();
    return {param_dtype, grad_dtype, is_random};
  }
};

TEST_P(CpuOptimizerBits, OfAdamWIn32BitsAreTheScalarOnes) {
  bits<AdamWRule>().compare_32bit_steps();
}
TEST_P(CpuOptimizerBits, OfAdamWIn8BitsAreTheScalarOnes) { bits<AdamWRule>().compare_8bit_steps(); }
TEST_P(CpuOptimizerBits, OfLionIn32BitsAreTheScalarOnes) { bits<LionRule>().compare_32bit_steps(); }
TEST_P(CpuOptimizerBits, OfLionIn8BitsAreTheScalarOnes) { bits<LionRule>().compare_8bit_steps(); }

std::string name_of_case(const testing::TestParamInfo<std::tuple<DType, DType, bool>>& info) {
  const auto [param_dtype, grad_dtype, is_random] = info.param;
  return std::string(name_of(param_dtype)) + "Grad" + name_of(grad_dtype) +
         (is_random ? "Random" : "");
}

// A stream changes nothing where parameters are not bfloat16.
INSTANTIATE_TEST_SUITE_P(Dtypes, CpuOptimizerBits,
                         testing::Combine(float_dtypes, float_dtypes, testing::Bool()),
                         name_of_case);

}  // namespace
}  // namespace qlora
