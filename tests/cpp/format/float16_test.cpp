#include "format/float16.h"

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include <gtest/gtest.h>

#include "support/host_tensor.h"

namespace qlora {
namespace {

constexpr float infinity = std::numeric_limits<float>::infinity();

template <typename T>
T pattern(std::uint32_t bits) {
  return {static_cast<std::uint16_t>(bits)};
}

/// What an independent decoder makes of the same 16 bits.
double decode(DType dtype, std::uint32_t bits) {
  HostTensor tensor(dtype, {1});
  tensor.bytes() = {static_cast<std::uint8_t>(bits & 0xff), static_cast<std::uint8_t>(bits >> 8)};
  return tensor[0];
}

template <typename T>
void expect_every_pattern_decodes(DType dtype) {
  for (std::uint32_t bits = 0; bits < 65536; ++bits) {
    const double want = decode(dtype, bits);
    const double got = static_cast<double>(to_float(pattern<T>(bits)));
    if (std::isnan(want)) {
      ASSERT_TRUE(std::isnan(got)) << "pattern " << bits;
    } else {
      ASSERT_EQ(got, want) << "pattern " << bits;
      ASSERT_EQ(std::signbit(got), std::signbit(want)) << "pattern " << bits;
    }
  }
}

template <typename T>
void expect_every_pattern_survives_the_round_trip() {
  for (std::uint32_t bits = 0; bits < 65536; ++bits) {
    const float value = to_float(pattern<T>(bits));
    const T back = from_float<T>(value);
    if (std::isnan(value)) {
      ASSERT_TRUE(std::isnan(to_float(back))) << "pattern " << bits;
    } else {
      ASSERT_EQ(back.bits, bits);
    }
  }
}

/// All places where rounding can turn: each value, each midpoint to the next one, and the fp32
/// neighbours of both.
template <typename T>
void expect_every_rounding_is_to_nearest_even(DType dtype) {
  const auto expect_rounding_of = [&](float x) {
    for (const float signed_x : {x, -x}) {
      const double want = reference::round_to(format_of(dtype), static_cast<double>(signed_x));
      ASSERT_EQ(static_cast<double>(round_through<T>(signed_x)), want) << "x = " << signed_x;
    }
  };
  for (std::uint32_t bits = 0; std::isfinite(decode(dtype, bits)); ++bits) {
    const double value = decode(dtype, bits);
    // Beyond the largest value the next step would be as wide as the last one.
    const double next = std::isfinite(decode(dtype, bits + 1))
                            ? decode(dtype, bits + 1)
                            : 2.0 * value - decode(dtype, bits - 1);
    for (const double x : {value, (value + next) / 2.0}) {
      const float exact = static_cast<float>(x);
      ASSERT_EQ(static_cast<double>(exact), x);
      for (const float near :
           {std::nextafter(exact, 0.0f), exact, std::nextafter(exact, infinity)}) {
        expect_rounding_of(near);
        if (testing::Test::HasFatalFailure()) return;
      }
    }
  }
}

TEST(Float16, EveryPatternDecodesToItsValue) {
  expect_every_pattern_decodes<Float16>(DType::float16);
}
TEST(BFloat16, EveryPatternDecodesToItsValue) {
  expect_every_pattern_decodes<BFloat16>(DType::bfloat16);
}

TEST(Float16, EveryPatternSurvivesTheRoundTrip) {
  expect_every_pattern_survives_the_round_trip<Float16>();
}
TEST(BFloat16, EveryPatternSurvivesTheRoundTrip) {
  expect_every_pattern_survives_the_round_trip<BFloat16>();
}

TEST(Float16, RoundsToNearestEvenAroundEveryValueAndMidpoint) {
  expect_every_rounding_is_to_nearest_even<Float16>(DType::float16);
}
TEST(BFloat16, RoundsToNearestEvenAroundEveryValueAndMidpoint) {
  expect_every_rounding_is_to_nearest_even<BFloat16>(DType::bfloat16);
}

TEST(Float16, OverflowsToInfinityFrom65520) {
  EXPECT_EQ(round_through<Float16>(65519.996f), 65504.0f);
  EXPECT_EQ(round_through<Float16>(65520.0f), infinity);
  EXPECT_EQ(round_through<Float16>(-65520.0f), -infinity);
  EXPECT_EQ(round_through<Float16>(3e38f), infinity);
  EXPECT_EQ(round_through<Float16>(infinity), infinity);
}
TEST(BFloat16, OverflowsToInfinityBeyondItsLargestValue) {
  EXPECT_EQ(round_through<BFloat16>(0x1.fefffep127f), 0x1.fep127f);
  EXPECT_EQ(round_through<BFloat16>(0x1.ffp127f), infinity);
  EXPECT_EQ(round_through<BFloat16>(-0x1.fffffep127f), -infinity);
}

TEST(Float16, NaNOfAnyPayloadStaysNaN) {
  for (const std::uint32_t bits : {0x7f800001u, 0x7fc00000u, 0x7fffffffu, 0xff800001u}) {
    EXPECT_TRUE(std::isnan(round_through<Float16>(std::bit_cast<float>(bits))));
    EXPECT_TRUE(std::isnan(round_through<BFloat16>(std::bit_cast<float>(bits))));
  }
}

TEST(Float16, ConversionsWorkInConstantExpressions) {
  static_assert(from_float<Float16>(1.0f).bits == 0x3c00);
  static_assert(from_float<BFloat16>(1.0f).bits == 0x3f80);
  static_assert(to_float(Float16{0x0001}) == 0x1p-24f);
}

#if defined(__FLT16_MAX__)
TEST(Float16, AgreesWithTheCompilersOwnType) {
  __extension__ typedef _Float16 Native;
  for (std::uint32_t bits = 0; bits < 65536; ++bits) {
    const auto native = static_cast<float>(std::bit_cast<Native>(static_cast<std::uint16_t>(bits)));
    const float ours = to_float(pattern<Float16>(bits));
    ASSERT_TRUE(native == ours || (std::isnan(native) && std::isnan(ours))) << "pattern " << bits;
  }
  Generator generator(2);
  for (int trial = 0; trial < 200000; ++trial) {
    // Any exponent of fp32, those around float16's range four times in five.
    auto bits = static_cast<std::uint32_t>(generator() >> 32);
    if (trial % 5 != 0) bits = (bits & 0x807fffffu) | (100u + bits % 45u) << 23;
    const float x = std::bit_cast<float>(bits);
    if (std::isnan(x)) continue;
    ASSERT_EQ(from_float<Float16>(x).bits, std::bit_cast<std::uint16_t>(static_cast<Native>(x)))
        << "x = " << x;
  }
}
#endif

}  // namespace
}  // namespace qlora
