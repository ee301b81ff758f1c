#include "format/block_normalizer.h"

#include <cmath>

#include <gtest/gtest.h>

#include "support/host_tensor.h"

namespace qlora {
namespace {

/// round(x * round(1 / absmax)), both roundings to fp32, computed in fp64.
float expected(float absmax, float x) {
  const auto reciprocal = static_cast<float>(1.0 / static_cast<double>(absmax));
  return static_cast<float>(static_cast<double>(x) * static_cast<double>(reciprocal));
}

TEST(BlockNormalizer, MultipliesByTheRoundedReciprocal) {
  Generator generator(3);
  std::uniform_real_distribution<float> uniform(0.01f, 100.0f);
  int differences_from_division = 0;
  for (int trial = 0; trial < 10000; ++trial) {
    const float absmax = uniform(generator), x = absmax * std::sin(static_cast<float>(trial));
    ASSERT_EQ(BlockNormalizer(absmax)(x), expected(absmax, x)) << x << " / " << absmax;
    differences_from_division += BlockNormalizer(absmax)(x) != x / absmax;
  }
  EXPECT_GT(differences_from_division, 1000);  // so the rule can be told from a division
}

TEST(BlockNormalizer, LargestFp32DoesNotUnderflow) {
  EXPECT_NEAR(BlockNormalizer(0x1.fffffep127f)(0x1.fffffep127f), 1.0f, 1e-6f);
}

TEST(BlockNormalizer, SubnormalAbsmaxWithAFiniteReciprocalMultiplies) {
  const float absmax = 0x1.8p-127f;  // 1 / absmax = 2^127 / 1.5
  EXPECT_EQ(BlockNormalizer(absmax)(absmax), expected(absmax, absmax));
}

TEST(BlockNormalizer, SubnormalAbsmaxWithoutAFiniteReciprocalDivides) {
  for (const float absmax : {0x1p-149f, 0x1p-140f, 0x1p-128f}) {
    const BlockNormalizer normalize(absmax);
    EXPECT_EQ(normalize(absmax), 1.0f);
    EXPECT_EQ(normalize(-absmax), -1.0f);
    EXPECT_EQ(normalize(0.0f), 0.0f);  // 0 * Inf would be NaN
  }
  EXPECT_EQ(BlockNormalizer(0x1p-148f)(0x1p-149f), 0.5f);
}

}  // namespace
}  // namespace qlora
