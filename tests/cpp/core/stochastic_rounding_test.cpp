#include "core/stochastic_rounding.h"

#include <cmath>
#include <limits>
#include <set>

#include <gtest/gtest.h>

namespace qlora {
namespace {

constexpr std::uint16_t rounded(std::uint32_t bits, std::uint32_t random) {
  return round_stochastically(std::bit_cast<float>(bits), random).bits;
}

TEST(RoundStochastically, WhatIsExactStays) {
  for (std::uint32_t upper = 0; upper <= 0xffff; ++upper) {
    if (std::isnan(std::bit_cast<float>(upper << 16))) continue;
    ASSERT_EQ(rounded(upper << 16, 0), upper);
    ASSERT_EQ(rounded(upper << 16, 0xffff), upper);
  }
}

TEST(RoundStochastically, OneOf65536RandomNumbersTakesAwayFromZeroForEachUnitThatIsCutOff) {
  for (const std::uint32_t cut : {0u, 1u, 0x4000u, 0x8000u, 0xffffu}) {
    for (const std::uint32_t upper : {0x3f80u, 0xbf80u, 0x0001u, 0x8000u, 0x7f7fu}) {
      std::uint32_t away = 0;
      for (std::uint32_t random = 0; random <= 0xffff; ++random) {
        const std::uint32_t bits = rounded(upper << 16 | cut, random);
        ASSERT_TRUE(bits == upper || bits == upper + 1);
        away += bits == upper + 1;
      }
      EXPECT_EQ(away, cut) << std::hex << upper;
    }
  }
}

// Compiled: the same on a device as here.
static_assert(rounded(0x3f80'8000u, 0x7fff) == 0x3f80);
static_assert(rounded(0x3f80'8000u, 0x8000) == 0x3f81);
static_assert(rounded(0x80000000u, 0xffff) == 0x8000);  // -0
static_assert(rounded(0x7f800000u, 0xffff) == 0x7f80);  // Inf
static_assert(rounded(0xff800000u, 0xffff) == 0xff80);  // -Inf
static_assert(rounded(0x7f7f0000u, 0xffff) == 0x7f7f);  // the largest bfloat16
static_assert(rounded(0x7f7fffffu, 0) == 0x7f7f);       // the largest float32, between it and Inf
static_assert(rounded(0x7f7fffffu, 1) == 0x7f80);
static_assert(rounded(0x007f'ffffu, 0xffff) == 0x0080);  // from the largest subnormal
static_assert(rounded(0x7fc00000u, 0) == 0x7fc0);        // NaN
static_assert(rounded(0xffffffffu, 0xffff) == 0x7fc0);   // NaN, which must not become 0
static_assert(rounded(0x7f800001u, 0) == 0x7fc0);        // NaN, which must not become Inf

TEST(RoundingStream, CountersAreNumberElementAndStep) {
  constexpr RoundingStream stream{.seed = 0x299f31d0a4093822u,
                                  .first_counter = RoundingStream::counter_of(0x56789a, 0x9a000),
                                  .step = 0xdeadbeef};
  static_assert(stream.first_counter == 0x56789a'0000013400u);
  const PhiloxWords words = stream.words_of_eight(0x12);
  const PhiloxWords want = philox4x32({{0x00013412u, 0x56789a00u, 0xdeadbeefu, 0}}, stream.seed);
  for (int i = 0; i < 4; ++i) EXPECT_EQ(words.word[i], want.word[i]);
}

TEST(RoundingStream, TheLargestNumberAndAPastEndElementHaveCountersOfTheirOwn) {
  static_assert(RoundingStream::counter_of(RoundingStream::max_number, 0) == 0xffffff'0000000000u);
  // 2^43 elements fit between two numbers.
  static_assert(RoundingStream::counter_of(1, 0) -
                    RoundingStream::counter_of(0, (std::int64_t{1} << 43) - 8) ==
                1);
  // The lower word carries into the upper.
  const RoundingStream stream{.seed = 1, .first_counter = 0xffffffffu, .step = 2};
  EXPECT_EQ(stream.words_of_eight(1).word[0], philox4x32({{0, 1, 2, 0}}, 1).word[0]);
}

TEST(RoundingStream, AWordIsTwoHalvesTheLowerFirst) {
  constexpr PhiloxWords words{{0x00010000u, 0x00030002u, 0x00050004u, 0xffff0006u}};
  for (int i = 0; i < 7; ++i) {
    EXPECT_EQ(RoundingStream::half_of(words, i), static_cast<std::uint32_t>(i));
  }
  EXPECT_EQ(RoundingStream::half_of(words, 7), 0xffffu);
}

}  // namespace
}  // namespace qlora
