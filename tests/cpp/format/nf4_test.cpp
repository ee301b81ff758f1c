#include "format/nf4.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include <gtest/gtest.h>

#include "support/golden.h"

namespace qlora {
namespace {

TEST(NF4, LevelsAreThoseOfBitsandbytes) {
  const auto levels = read_golden_floats("nf4_levels.bin");
  ASSERT_EQ(levels.size(), 16u);
  for (int code = 0; code < 16; ++code) {
    EXPECT_EQ(nf4_level(code), levels[static_cast<std::size_t>(code)]) << "code " << code;
  }
}

TEST(NF4, ThresholdsAreTheFp32MidpointsOfTheLevels) {
  for (int i = 0; i < 15; ++i) {
    const double midpoint = (static_cast<double>(nf4_level(i)) + nf4_level(i + 1)) / 2.0;
    EXPECT_EQ(nf4_threshold(i), static_cast<float>(midpoint)) << "threshold " << i;
  }
}

TEST(NF4, EveryLevelEncodesToItsOwnCode) {
  for (int code = 0; code < 16; ++code) EXPECT_EQ(nf4_encode(nf4_level(code)), code);
}

TEST(NF4, ATieGoesToTheLowerCode) {
  const float infinity = std::numeric_limits<float>::infinity();
  for (int i = 0; i < 15; ++i) {
    const float threshold = nf4_threshold(i);
    EXPECT_EQ(nf4_encode(std::nextafter(threshold, -infinity)), i);
    EXPECT_EQ(nf4_encode(threshold), i);
    EXPECT_EQ(nf4_encode(std::nextafter(threshold, infinity)), i + 1);
  }
}

TEST(NF4, EncodingFindsTheNearestLevel) {
  const auto levels = read_golden_floats("nf4_levels.bin");
  for (int i = -20000; i <= 20000; ++i) {
    const float x = static_cast<float>(i) / 19000.0f;  // a little beyond [-1, 1] too
    double nearest = HUGE_VAL;
    for (const double level : levels) nearest = std::min(nearest, std::fabs(level - x));
    const double distance = std::fabs(static_cast<double>(nf4_level(nf4_encode(x))) - x);
    // A threshold is rounded to fp32, by at most 2^-25: between the two distances that counts
    // twice.
    ASSERT_LE(distance, nearest + 0x1p-24) << "x = " << x;
  }
}

TEST(NF4, ZeroOfEitherSignHasTheZeroCodeAndDecodesToPositiveZero) {
  EXPECT_EQ(nf4_encode(0.0f), nf4_zero_code);
  EXPECT_EQ(nf4_encode(-0.0f), nf4_zero_code);
  EXPECT_FALSE(std::signbit(nf4_level(nf4_zero_code)));
}

}  // namespace
}  // namespace qlora
