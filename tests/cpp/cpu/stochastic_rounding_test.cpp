// What steps do to bfloat16 parameters that are rounded at random. Lion's step makes the fp32 that is
// rounded one that is known: p - lr sign(g), where there is no decay.
#include "core/stochastic_rounding.h"

#include <cmath>
#include <set>

#include "core/operations.h"
#include "format/nf4_layout.h"
#include "support/host_tensor.h"
#include "support/optimizer_tensors.h"

namespace qlora {
namespace {

HostTensor zeros(DType dtype, std::int64_t count) {
  return {dtype, {count}, std::vector<double>(static_cast<std::size_t>(count))};
}

OptimizerStep make_step(double lr, std::uint64_t seed = 5, std::int64_t number = 1) {
  OptimizerStep step;
  step.lr = lr;
  step.weight_decay = 0.0;
  step.step = number;
  step.rounding_seed = seed;
  return step;
}

/// Lion's state of either kind beside a parameter, whose gradient is 1.
struct Trained {
  HostTensor param, grad, exp_avg, absmax;
  bool is_8bit;

  Trained(HostTensor start, bool in_8_bits)
      : param(std::move(start)),
        grad(DType::float32, {param.numel()},
             std::vector<double>(static_cast<std::size_t>(param.numel()), 1.0)),
        exp_avg(DType::float32, {0}),
        absmax(zeros(DType::float32, ceil_divide(param.numel(), state_block_size))),
        is_8bit(in_8_bits) {
    exp_avg = is_8bit
                  ? HostTensor(DType::uint8, {param.numel()},
                               std::vector<double>(static_cast<std::size_t>(param.numel()), 127.0))
                  : zeros(DType::float32, param.numel());
  }

  OptimizerTensor view() {
    return is_8bit ? with_8bit_state(param.view(), grad.view(), exp_avg.view(), absmax.view())
                   : with_32bit_state(param.view(), grad.view(), exp_avg.view());
  }

  void step(const OptimizerStep& step, std::int64_t number = 0, int num_threads = 1) {
    OptimizerTensor tensor = view();
    tensor.number = number;
    lion_step(std::span(&tensor, 1), step, {.num_threads = num_threads});
  }
};

HostTensor filled(DType dtype, std::int64_t count, double value) {
  return {dtype, {count}, std::vector<double>(static_cast<std::size_t>(count), value)};
}

/// Of bfloat16 numbers of the magnitude of x.
double spacing_at(double x) { return std::exp2(std::max(std::ilogb(x), -126) - 7); }

class CpuStochasticRounding : public testing::TestWithParam<bool> {
 protected:
  const bool is_8bit = GetParam();
  Generator generator{71};

  Trained make(std::int64_t count, double value) {
    return {filled(DType::bfloat16, count, value), is_8bit};
  }
};

TEST_P(CpuStochasticRounding, WhatIsExactStays) {
  constexpr std::int64_t count = 5003;
  const HostTensor start = HostTensor::random(DType::bfloat16, {count}, generator);
  Trained trained(start, is_8bit);
  for (std::int64_t t = 1; t <= 5; ++t) trained.step(make_step(0.0, 5, t));
  EXPECT_EQ(trained.param.bytes(), start.bytes());
  trained = make(count, 1.0);
  trained.step(make_step(0x1p-7));  // two units of the last place below 1
  EXPECT_EQ(trained.param.bytes(), filled(DType::bfloat16, count, 1.0 - 0x1p-7).bytes());
}

TEST_P(CpuStochasticRounding, BothNeighboursOccurWithTheirProbabilitiesAndNothingElse) {
  constexpr std::int64_t count = 1 << 16;
  for (const double sign : {1.0, -1.0}) {
    for (const double share : {1.0 / 256, 0.25, 0.5, 0.9375}) {  // of the way down from 1
      Trained trained = make(count, sign);
      OptimizerStep step = make_step(share * 0x1p-8);
      step.maximize = sign < 0.0;
      trained.step(step);
      std::int64_t down = 0;
      for (std::int64_t i = 0; i < count; ++i) {
        const double size = sign * trained.param[i];
        ASSERT_TRUE(size == 1.0 || size == 1.0 - 0x1p-8) << size;
        down += size != 1.0;
      }
      // Five standard deviations of a binomial count.
      const double n = count;
      EXPECT_NEAR(static_cast<double>(down), n * share, 5.0 * std::sqrt(n * share * (1.0 - share)))
          << share;
    }
  }
}

TEST_P(CpuStochasticRounding, EveryPlaceOfARegisterAndABlockIsRoundedLikeTheOthers) {
  constexpr std::int64_t steps = 2000;
  std::vector<int> down(256 + 13);
  for (std::int64_t t = 1; t <= steps; ++t) {
    Trained trained = make(static_cast<std::int64_t>(down.size()), 1.0);
    trained.step(make_step(0.25 * 0x1p-8, 5, t));
    for (std::size_t i = 0; i < down.size(); ++i) {
      down[i] += trained.param[static_cast<std::int64_t>(i)] != 1.0;
    }
  }
  for (const int n : down) EXPECT_NEAR(n, 0.25 * steps, 5.0 * std::sqrt(steps * 0.25 * 0.75));
}

TEST_P(CpuStochasticRounding, TheMeanIsTheNumberItself) {
  constexpr std::int64_t count = 100'000;
  const HostTensor start = HostTensor::random(DType::bfloat16, {count}, generator);
  constexpr double lr = 0x1.5p-10;
  Trained trained(start, is_8bit);
  trained.step(make_step(lr));
  double sum = 0.0, variance = 0.0;
  for (std::int64_t i = 0; i < count; ++i) {
    const double x = reference::round_to(reference::float32_format, start[i] - lr);
    const double spacing = spacing_at(x);
    const double cut = std::fabs(x) / spacing - std::floor(std::fabs(x) / spacing);
    sum += trained.param[i] - x;
    variance += cut * (1.0 - cut) * spacing * spacing;
    ASSERT_LT(std::fabs(trained.param[i] - x), spacing) << "element " << i;
  }
  EXPECT_GT(variance, 0.0);
  EXPECT_NEAR(sum, 0.0, 5.0 * std::sqrt(variance));
}

TEST_P(CpuStochasticRounding, UpdatesBelowHalfALastPlaceAreNotLost) {
  constexpr std::int64_t count = 4096, steps = 64;
  constexpr double lr = 0x1p-12;  // a sixteenth of the last place below 1
  Trained random = make(count, 1.0), nearest = random;
  OptimizerStep to_nearest = make_step(lr);
  to_nearest.rounding_seed.reset();
  for (std::int64_t t = 1; t <= steps; ++t) {
    random.step(make_step(lr, 5, t));
    nearest.step(to_nearest);
  }
  EXPECT_EQ(nearest.param.bytes(), filled(DType::bfloat16, count, 1.0).bytes());
  double sum = 0.0;
  for (std::int64_t i = 0; i < count; ++i) sum += random.param[i];
  // Each step's variance is share (1 - share) units of the last place squared.
  const double deviation =
      0x1p-8 * std::sqrt(steps * (1.0 / 16) * (15.0 / 16) / static_cast<double>(count));
  EXPECT_NEAR(sum / static_cast<double>(count), 1.0 - steps * lr, 5.0 * deviation);
}

TEST_P(CpuStochasticRounding, IsAFunctionOfSeedStepAndNumberAlone) {
  constexpr std::int64_t count = 3000;
  const auto bits = [&](std::uint64_t seed, std::int64_t t, std::int64_t number, int num_threads) {
    Trained trained = make(count, 1.0);
    trained.step(make_step(0x1p-9, seed, t), number, num_threads);
    return trained.param.bytes();
  };
  const auto first = bits(5, 1, 0, 1);
  EXPECT_EQ(bits(5, 1, 0, 1), first);
  EXPECT_EQ(bits(5, 1, 0, 2), first);
  std::set<std::vector<std::uint8_t>> all{first};
  all.insert(bits(6, 1, 0, 1));
  all.insert(bits(5 + (std::uint64_t{1} << 32), 1, 0, 1));
  all.insert(bits(5, 2, 0, 1));
  all.insert(bits(5, 1, 1, 1));
  all.insert(bits(5, 1, RoundingStream::max_number, 1));
  EXPECT_EQ(all.size(), 6u);
}

TEST_P(CpuStochasticRounding, AStepCountInMemoryIsTheStep) {
  Trained trained = make(1000, 1.0), counted = trained;
  HostTensor step_count(DType::float32, {1}, {6.0});
  trained.step(make_step(0x1p-9, 5, 7));
  OptimizerTensor tensor = counted.view();
  tensor.step_count = step_count.view();
  lion_step(std::span(&tensor, 1), make_step(0x1p-9, 5, 1), {});
  EXPECT_EQ(counted.param.bytes(), trained.param.bytes());
}

TEST_P(CpuStochasticRounding, PiecesOfAParameterHaveTheBitsOfTheWhole) {
  constexpr std::int64_t count = 40'000;
  Trained whole(HostTensor::random(DType::bfloat16, {count}, generator), is_8bit);
  Trained pieces = whole;
  whole.step(make_step(0x1p-9), 3);
  std::vector<OptimizerTensor> list;
  const std::int64_t cuts[] = {0, 256, 1024, 17408, 39936, count};
  for (int i = 0; i < 5; ++i) {
    const std::int64_t begin = cuts[i], size = cuts[i + 1] - cuts[i];
    const auto slice = [&](TensorView view, std::int64_t first, std::int64_t n) {
      view.data = static_cast<std::byte*>(view.data) + first * element_bytes(view.dtype);
      view.shape = {n};
      return view;
    };
    OptimizerTensor piece = pieces.view();
    piece.param = slice(piece.param, begin, size);
    piece.grad = slice(piece.grad, begin, size);
    piece.state.exp_avg = slice(piece.state.exp_avg, begin, size);
    if (is_8bit) {
      piece.state.exp_avg_absmax = slice(piece.state.exp_avg_absmax, begin / state_block_size,
                                         ceil_divide(size, state_block_size));
    }
    piece.number = 3;
    piece.first_element = begin;
    list.push_back(piece);
  }
  lion_step(list, make_step(0x1p-9), {.num_threads = 2});
  EXPECT_EQ(pieces.param.bytes(), whole.param.bytes());
}

TEST_P(CpuStochasticRounding, InfNaNZerosAndTheLargestNumbersKeepTheirBits) {
  const double largest = reference::bfloat16_format.max;
  const std::vector<double> values = {HUGE_VAL, -HUGE_VAL, std::nan(""), 0.0,
                                      -0.0,     largest,   -largest,     0x1p-133};
  constexpr std::int64_t count = 800;
  HostTensor start(DType::bfloat16, {count});
  for (std::int64_t i = 0; i < count; ++i) start.set(i, values[static_cast<std::size_t>(i % 8)]);
  Trained trained(start, is_8bit);
  trained.grad = zeros(DType::float32, count);
  for (std::int64_t t = 1; t <= 4; ++t) trained.step(make_step(0.5, 5, t));
  EXPECT_EQ(trained.param.bytes(), start.bytes());
}

TEST_P(CpuStochasticRounding, Float32ParametersAreNotRounded) {
  Trained random(HostTensor::random(DType::float32, {1000}, generator), is_8bit);
  Trained plain = random;
  OptimizerStep step = make_step(1e-3);
  random.step(step);
  step.rounding_seed.reset();
  plain.step(step);
  EXPECT_EQ(random.param.bytes(), plain.param.bytes());
}

TEST_P(CpuStochasticRounding, OnlyTheRoundingOfParametersIsRandom) {
  Trained random(HostTensor::random(DType::bfloat16, {1000}, generator), is_8bit);
  random.grad = HostTensor::random(DType::float32, {1000}, generator);
  Trained nearest = random;
  OptimizerStep step = make_step(1e-3);
  random.step(step);
  step.rounding_seed.reset();
  nearest.step(step);
  EXPECT_NE(random.param.bytes(), nearest.param.bytes());
  EXPECT_EQ(random.exp_avg.bytes(), nearest.exp_avg.bytes());
  EXPECT_EQ(random.absmax.bytes(), nearest.absmax.bytes());
}

INSTANTIATE_TEST_SUITE_P(State, CpuStochasticRounding, testing::Bool(), [](const auto& instance) {
  return instance.param ? "In8Bits" : "In32Bits";
});

}  // namespace
}  // namespace qlora
