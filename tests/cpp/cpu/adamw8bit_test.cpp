// adamw8bit_step: a step in fp64 from the decoded state, the encoding of the new state, and
// closeness to 32-bit state.
#include <algorithm>
#include <cmath>

#include "core/operations.h"
#include "support/optimizer_tensors.h"
#include "support/stored_moment.h"

namespace qlora {
namespace {

using reference::AdamWElement;

constexpr AdamWElement::Numbers numbers = {1e-3, 0.9, 0.999, 1e-8, 1e-2};
constexpr std::int64_t block = StoredMoment::block;

OptimizerStep make_step(std::int64_t t) {
  OptimizerStep step;
  step.step = t;
  return step;
}

struct Trained {
  HostTensor param, grad;
  StoredMoment exp_avg, exp_avg_sq;

  Trained(DType param_dtype, DType grad_dtype, std::int64_t count, Generator& generator)
      : param(HostTensor::random(param_dtype, {count}, generator, 0.1)),
        grad(grad_dtype, {count}),
        exp_avg(StoredMoment::first(count)),
        exp_avg_sq(StoredMoment::second(count)) {}

  void draw_gradient(Generator& generator) {
    std::normal_distribution<double> normal(0.0, 0.01);
    for (std::int64_t i = 0; i < grad.numel(); ++i) grad.set(i, normal(generator));
  }

  OptimizerTensor view() {
    return with_8bit_state(param.view(), grad.view(), exp_avg.codes.view(), exp_avg.absmax.view(),
                           exp_avg_sq.codes.view(), exp_avg_sq.absmax.view());
  }

  void step(std::int64_t t) {
    const OptimizerTensor tensor = view();
    adamw_step(std::span(&tensor, 1), make_step(t), {});
  }

  AdamWElement element(std::int64_t i) const {
    return {.param = param[i], .exp_avg = exp_avg.decode(i), .exp_avg_sq = exp_avg_sq.decode(i)};
  }
};

class CpuAdamW8bitDtypes : public testing::TestWithParam<std::tuple<DType, DType>> {
 protected:
  const DType param_dtype = std::get<0>(GetParam()), grad_dtype = std::get<1>(GetParam());
};

TEST_P(CpuAdamW8bitDtypes, AStepDecodesUpdatesInFp32AndEncodes) {
  Generator generator(22);
  for (const std::int64_t count : {1, 255, 256, 257, 1000}) {  // most with a short last block
    Trained trained(param_dtype, grad_dtype, count, generator);
    for (std::int64_t t = 1; t <= 6; ++t) {
      SCOPED_TRACE(message(count, " elements, step ", t));
      trained.draw_gradient(generator);
      std::vector<AdamWElement> want;
      for (std::int64_t i = 0; i < count; ++i) {
        want.push_back(trained.element(i));
        want.back().step(trained.grad[i], numbers, t);
      }
      trained.step(t);
      std::vector<double> param, param_error;
      std::vector<double> largest(static_cast<std::size_t>((count + block - 1) / block));
      std::vector<double> largest_sq = largest, error = largest, error_sq = largest;
      for (std::size_t i = 0; i < want.size(); ++i) {
        param.push_back(want[i].param);
        param_error.push_back(want[i].param_error);
        const std::size_t b = i / block;
        largest[b] = std::max(largest[b], std::fabs(want[i].exp_avg));
        largest_sq[b] = std::max(largest_sq[b], want[i].exp_avg_sq);
        error[b] = std::max(error[b], want[i].exp_avg_error);
        error_sq[b] = std::max(error_sq[b], want[i].exp_avg_sq_error);
      }
      EXPECT_TRUE(is_rounded_from(trained.param, param, param_error));
      EXPECT_TRUE(is_rounded_from(trained.exp_avg.absmax, largest, error));
      EXPECT_TRUE(is_rounded_from(trained.exp_avg_sq.absmax, largest_sq, error_sq));
      for (std::size_t i = 0; i < want.size(); ++i) {
        const auto at = static_cast<std::int64_t>(i);
        trained.exp_avg.expect_nearest(at, want[i].exp_avg, error[i / block]);
        trained.exp_avg_sq.expect_nearest(at, want[i].exp_avg_sq, error_sq[i / block]);
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Dtypes, CpuAdamW8bitDtypes, testing::Combine(float_dtypes, float_dtypes),
                         [](const auto& instance) {
                           return std::string(name_of(std::get<0>(instance.param))) + "Grad" +
                                  name_of(std::get<1>(instance.param));
                         });

TEST(CpuAdamW8bitEncoding, AMomentOnAMidpointGetsTheLowerCode) {
  // With beta1 = 0 the first moment is the gradient, and one gradient of 1 makes the others their
  // own units of absmax: each midpoint of the map and the fp32 on either side of it, a few to a
  // block.
  constexpr std::int64_t midpoints_per_block = 85;
  Generator generator(29);
  Trained trained(DType::float32, DType::float32, 3 * block, generator);
  std::vector<std::uint8_t> codes;
  for (int i = 0; i < 255; ++i) {
    if (i % midpoints_per_block == 0) {
      trained.grad.set(static_cast<std::int64_t>(codes.size()), 1.0);
      codes.push_back(255);
    }
    const auto low = static_cast<std::size_t>(i);
    const std::vector<double>& map = trained.exp_avg.map;
    const auto midpoint = static_cast<float>((map[low] + map[low + 1]) / 2.0);
    for (const float x :
         {std::nextafter(midpoint, -2.0f), midpoint, std::nextafter(midpoint, 2.0f)}) {
      trained.grad.set(static_cast<std::int64_t>(codes.size()), x);
      codes.push_back(static_cast<std::uint8_t>(x > midpoint ? i + 1 : i));
    }
  }
  OptimizerStep step = make_step(1);
  step.beta1 = 0.0;
  const OptimizerTensor tensor = trained.view();
  adamw_step(std::span(&tensor, 1), step, {});
  EXPECT_EQ(trained.exp_avg.codes.bytes(), codes);
}

TEST(CpuAdamW8bitEncoding, ASubnormalSecondMomentIsKept) {
  // Gradients of 1e-20 have squares below the normal fp32, where 1 / absmax overflows.
  Generator generator(30);
  Trained trained(DType::float32, DType::float32, 300, generator);
  for (std::int64_t i = 0; i < 300; ++i) trained.grad.set(i, i % 2 ? 1e-20 : -1e-20);
  trained.step(1);
  EXPECT_EQ(trained.exp_avg_sq.codes.bytes(), std::vector<std::uint8_t>(300, 255));
  // 0.001 * 1e-40 has 7 bits left: two roundings, each by half of the smallest fp32.
  EXPECT_NEAR(trained.exp_avg_sq.absmax[0], 1e-43, 0x1p-149);
}

TEST(CpuAdamW8bitEncoding, ASecondMomentThatIsNotZeroIsNotEncodedAsZero) {
  Generator generator(31);
  Trained trained(DType::float32, DType::float32, 4, generator);
  trained.grad.set(0, 1.0);
  trained.grad.set(1, 1e-4);   // its square is a fiftieth of the map's least midpoint
  trained.grad.set(2, 1e-22);  // its square is 0 in units of absmax, and in fp32
  trained.grad.set(3, 0.0);
  trained.step(1);
  EXPECT_EQ(trained.exp_avg_sq.codes.bytes(), (std::vector<std::uint8_t>{255, 1, 0, 0}));
}

class CpuAdamW8bit : public testing::TestWithParam<DType> {};

TEST_P(CpuAdamW8bit, StaysCloseTo32BitState) {
  // The procedure and the limits of bitsandbytes' own tests: 50 steps, each from the 8-bit run's
  // decoded state.
  Generator generator(23);
  constexpr std::int64_t count = 32 * 1024;
  Trained trained(GetParam(), GetParam(), count, generator);
  HostTensor param(DType::float32, {count}), exp_avg(param), exp_avg_sq(param);
  for (std::int64_t t = 1; t <= 50; ++t) {
    for (std::int64_t i = 0; i < count; ++i) {
      param.set(i, trained.param[i]);
      exp_avg.set(i, trained.exp_avg.decode(i));
      exp_avg_sq.set(i, trained.exp_avg_sq.decode(i));
    }
    trained.draw_gradient(generator);
    const OptimizerTensor tensor =
        with_32bit_state(param.view(), trained.grad.view(), exp_avg.view(), exp_avg_sq.view());
    adamw_step(std::span(&tensor, 1), make_step(t), {});
    trained.step(t);

    int outliers = 0, outliers_sq = 0;
    double error = 0.0;
    for (std::int64_t i = 0; i < count; ++i) {
      const auto is_outlier = [](double a, double b) {
        return std::fabs(a - b) > 3e-3 + 1e-3 * std::fabs(b);
      };
      outliers += is_outlier(exp_avg[i], trained.exp_avg.decode(i));
      outliers_sq += is_outlier(exp_avg_sq[i], trained.exp_avg_sq.decode(i));
      error += std::fabs(param[i] - trained.param[i]) / static_cast<double>(count);
    }
    ASSERT_LT(outliers, 20) << "step " << t;
    ASSERT_LT(outliers_sq, 20) << "step " << t;
    ASSERT_LT(error, GetParam() == DType::bfloat16 ? 1.7e-4 : 6e-5) << "step " << t;
  }
}

TEST_P(CpuAdamW8bit, ANaNGradientReachesItsBlockAndNoFurther) {
  Generator generator(24);
  Trained trained(GetParam(), GetParam(), 3 * block + 17, generator);
  trained.draw_gradient(generator);
  trained.grad.set(block + 5, std::nan(""));
  trained.step(1);
  for (std::int64_t i = 0; i < trained.param.numel(); ++i) {
    EXPECT_EQ(std::isnan(trained.param[i]), i == block + 5) << "element " << i;
  }
  trained.draw_gradient(generator);
  trained.step(2);  // the block's scale is lost, so by now all of it is NaN, in sight
  for (std::int64_t i = 0; i < trained.param.numel(); ++i) {
    EXPECT_EQ(std::isnan(trained.param[i]), i / block == 1) << "element " << i;
  }
}

TEST_P(CpuAdamW8bit, ZeroGradientsFromZeroStateStayZero) {
  Generator generator(25);
  Trained trained(GetParam(), GetParam(), 300, generator);
  trained.grad = HostTensor(GetParam(), {300}, std::vector<double>(300, 0.0));
  trained.step(1);
  EXPECT_EQ(trained.exp_avg.codes.bytes(), std::vector<std::uint8_t>(300, 127));
  EXPECT_EQ(trained.exp_avg_sq.codes.bytes(), std::vector<std::uint8_t>(300, 0));
  EXPECT_EQ(trained.exp_avg.absmax.values(), (std::vector<double>{0.0, 0.0}));
}

TEST_P(CpuAdamW8bit, AListIsStepsOfItsMembers) {
  Generator generator(26);
  std::vector<Trained> together;
  for (const std::int64_t count : {0, 1, 16384, 0, 16641, 257, 50001}) {
    together.emplace_back(GetParam(), DType::float32, count, generator);
    together.back().draw_gradient(generator);
  }
  std::vector<Trained> alone = together;
  std::vector<OptimizerTensor> list;
  for (Trained& trained : together) list.push_back(trained.view());
  adamw_step(list, make_step(1), {.num_threads = 3});
  for (std::size_t i = 0; i < alone.size(); ++i) {
    alone[i].step(1);
    EXPECT_EQ(together[i].param.bytes(), alone[i].param.bytes()) << "tensor " << i;
    EXPECT_EQ(together[i].exp_avg.codes.bytes(), alone[i].exp_avg.codes.bytes());
    EXPECT_EQ(together[i].exp_avg_sq.codes.bytes(), alone[i].exp_avg_sq.codes.bytes());
    EXPECT_EQ(together[i].exp_avg_sq.absmax.bytes(), alone[i].exp_avg_sq.absmax.bytes());
  }
}

INSTANTIATE_TEST_SUITE_P(Dtypes, CpuAdamW8bit, float_dtypes, test_name_of);

}  // namespace
}  // namespace qlora
