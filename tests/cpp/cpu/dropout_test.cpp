#include <cmath>

#include "core/operations.h"
#include "core/philox.h"
#include "cpu/instruction_sets.h"
#include "support/host_tensor.h"

namespace qlora {
namespace {

using reference::float32_format;
using reference::round_to;

class CpuDropout : public testing::TestWithParam<DType> {
 protected:
  const DType dtype = GetParam();
  Generator generator{15};

  HostTensor apply(HostTensor& x, double p, std::int64_t seed, int num_threads = 1) {
    HostTensor out(dtype, {x.numel()});
    dropout(TensorView{x.view().data, dtype, {}, {x.numel()}, true, true}, p, seed_view(seed),
            out.view(), {.num_threads = num_threads});
    return out;
  }

  TensorView seed_view(std::int64_t seed) {
    seed_ = seed;
    return {&seed_, DType::int64, {}, {1}, true, true};
  }

 private:
  std::int64_t seed_ = 0;
};

TEST_P(CpuDropout, ElementEIsDecidedByWordEMod4OfCounterEDividedBy4) {
  constexpr double p = 0.3;
  constexpr std::int64_t seed = 0x123456789abcdef;
  const double keep_scale = round_to(float32_format, 1.0 / (1.0 - p));
  for (const std::int64_t count : {1, 3, 4, 5, 1023, 40001}) {
    HostTensor x = HostTensor::random(dtype, {count}, generator);
    const HostTensor out = apply(x, p, seed);
    for (std::int64_t e = 0; e < count; ++e) {
      const auto counter = static_cast<std::uint32_t>(e / 4);
      const std::uint32_t word = philox4x32({{counter, 0, 0, 0}}, seed).word[e % 4];
      const bool is_kept = static_cast<double>(word) >= std::floor(p * 0x1p32);
      const double scaled = round_to(format_of(dtype), round_to(float32_format, x[e] * keep_scale));
      ASSERT_EQ(out[e], is_kept ? scaled : 0.0) << "element " << e << " of " << count;
    }
  }
}

TEST_P(CpuDropout, KeepsTheRightShareOfElements) {
  constexpr std::int64_t count = 1 << 17;
  HostTensor x(dtype, {count}, std::vector<double>(count, 1.0));
  for (const double p : {0.05, 0.5, 0.9}) {
    const HostTensor out = apply(x, p, 99);
    double kept = 0.0, kept_after_kept = 0.0;
    for (std::int64_t e = 0; e < count; ++e) {
      kept += out[e] != 0.0;
      kept_after_kept += e > 0 && out[e] != 0.0 && out[e - 1] != 0.0;
    }
    // Five standard deviations of a binomial count; of neighbouring pairs, which overlap, at most
    // twice the variance.
    const double q = 1.0 - p, n = static_cast<double>(count);
    EXPECT_NEAR(kept, n * q, 5.0 * std::sqrt(n * q * p)) << "p = " << p;
    EXPECT_NEAR(kept_after_kept, n * q * q, 5.0 * std::sqrt(3.0 * n * q * q * (1.0 - q * q)));
  }
}

TEST_P(CpuDropout, BackwardOfTheSameSeedIsTheSameMask) {
  HostTensor x(dtype, {5000}, std::vector<double>(5000, 2.0));
  HostTensor gradient(dtype, {5000}, std::vector<double>(5000, -1.0));
  const HostTensor y = apply(x, 0.5, -42), dx = apply(gradient, 0.5, -42);
  for (std::int64_t e = 0; e < 5000; ++e) ASSERT_EQ(dx[e], -0.5 * y[e]) << "element " << e;
}

TEST_P(CpuDropout, TheMaskDependsOnTheSeedAndNotOnTheThreads) {
  HostTensor x = HostTensor::random(dtype, {200003}, generator);
  const HostTensor once = apply(x, 0.4, 5);
  for (const int threads : {2, 3, 7}) {
    EXPECT_EQ(apply(x, 0.4, 5, threads).bytes(), once.bytes()) << threads << " threads";
  }
  EXPECT_NE(apply(x, 0.4, 6).bytes(), once.bytes());
  EXPECT_NE(apply(x, 0.4, 5 + (std::int64_t{1} << 32)).bytes(), once.bytes());
}

TEST_P(CpuDropout, ZeroProbabilityIsTheIdentity) {
  HostTensor x = HostTensor::random(dtype, {4001}, generator);
  x.set(7, -0.0);
  x.set(8, HUGE_VAL);
  EXPECT_EQ(apply(x, 0.0, 3).bytes(), x.bytes());
}

TEST_P(CpuDropout, ADroppedNaNOrInfIsZero) {
  HostTensor x(dtype, {1000}, std::vector<double>(1000, HUGE_VAL));
  for (std::int64_t e = 0; e < 500; ++e) x.set(e, std::nan(""));
  const HostTensor out = apply(x, 0.5, 1);
  std::int64_t zeros = 0;
  for (const double value : out.values()) zeros += value == 0.0;
  EXPECT_NEAR(static_cast<double>(zeros), 500.0, 5.0 * std::sqrt(250.0));
}

TEST_P(CpuDropout, TheOutputMayBeTheInput) {
  HostTensor x = HostTensor::random(dtype, {3001}, generator);
  const HostTensor want = apply(x, 0.25, 11);
  dropout(x.view(), 0.25, seed_view(11), x.view(), {});
  EXPECT_EQ(x.bytes(), want.bytes());
}

TEST_P(CpuDropout, TheBitsAreTheScalarOnesFromAnyCounter) {
  HostTensor x = HostTensor::random(dtype, {8192 + 7}, generator);
  x.set(5, -0.0);
  for (const double p : {0.0, 1e-9, 0.5, 0.999999}) {
    for (const std::int64_t begin : {0, 4, 1000}) {  // begins anywhere, as threads do
      HostTensor ours(dtype, {x.numel()}, x.values());
      HostTensor wanted = ours;
      kernels().dropout(x.view(), p, -7, ours.view(), begin, x.numel());
      scalar_kernels().dropout(x.view(), p, -7, wanted.view(), begin, x.numel());
      ASSERT_EQ(ours.bytes(), wanted.bytes()) << "p = " << p << ", from " << begin;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Dtypes, CpuDropout, float_dtypes, test_name_of);

}  // namespace
}  // namespace qlora
