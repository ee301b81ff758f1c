// The error of NF4 on normally distributed weights is what bitsandbytes documents for its own.
#include <cmath>

#include "support/stored_weight.h"

namespace qlora {
namespace {

constexpr std::int64_t size = 1024;  // the figures are for a weight of 1024 x 1024

/// bitsandbytes' figures: mean of |error|, its standard deviation from weight to weight, mean of
/// |error| / |w|.
struct Figures {
  std::int64_t block_size;
  double error, error_deviation, relative_error;
};
constexpr Figures figures[] = {
    {32, .067746, .000069, .189726},   {64, .072798, .000074, .203339},
    {128, .076831, .000091, .215237},  {256, .080337, .000102, .226105},
    {512, .083547, .000143, .236079},  {1024, .086610, .000187, .245370},
    {2048, .089592, .000251, .254163}, {4096, .092547, .000360, .262473},
};

// An element's relative error is at most 1 (to the nearest of levels that include 0), so its
// deviation is at most 1/2 and that of the mean of 2^20 of them at most 2^-11.
constexpr double relative_error_deviation = 0x1p-11;

HostTensor& normal_weight() {
  static HostTensor weight = [] {
    Generator generator(12);
    return HostTensor::random(DType::float32, {size, size}, generator);
  }();
  return weight;
}

struct MeanError {
  double absolute = 0.0, relative = 0.0;
};

MeanError measure(std::int64_t block_size, bool is_nested) {
  HostTensor& w = normal_weight();
  StoredWeight weight(size, size, block_size, is_nested);
  HostTensor out(DType::float32, {size, size});
  nf4_quantize(w.view(), weight.view(), {.num_threads = 2});
  nf4_dequantize(weight.view(), out.view(), {.num_threads = 2});
  MeanError sum;
  for (std::int64_t e = 0; e < w.numel(); ++e) {
    const double exact = w[e], error = std::fabs(out[e] - exact);
    sum.absolute += error;
    sum.relative += error / (std::fabs(exact) + 1e-8);
  }
  const auto count = static_cast<double>(w.numel());
  return {sum.absolute / count, sum.relative / count};
}

class CpuNF4Error : public testing::TestWithParam<Figures> {};

TEST_P(CpuNF4Error, OfPlainScalesIsWithinSevenSigma) {
  const auto [block_size, error, error_deviation, relative_error] = GetParam();
  const MeanError measured = measure(block_size, false);
  EXPECT_NEAR(measured.absolute, error, 7.0 * error_deviation);
  EXPECT_NEAR(measured.relative, relative_error, 7.0 * relative_error_deviation);
}

TEST_P(CpuNF4Error, OfNestedScalesIsUnderTheLimits) {
  const MeanError measured = measure(GetParam().block_size, true);
  EXPECT_LT(measured.absolute, .11);
  EXPECT_LT(measured.relative, .28);
  // The nested scales themselves cost little: under 1 % of the error at block 32, where they matter
  // most.
  EXPECT_LT(measured.absolute, 1.01 * GetParam().error + 7.0 * GetParam().error_deviation);
}

INSTANTIATE_TEST_SUITE_P(BlockSizes, CpuNF4Error, testing::ValuesIn(figures),
                         [](const auto& instance) {
                           return "Block" + std::to_string(instance.param.block_size);
                         });

}  // namespace
}  // namespace qlora
