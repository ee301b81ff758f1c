#include "format/dynamic_map.h"

#include <algorithm>
#include <cmath>
#include <string>

#include <gtest/gtest.h>

#include "support/golden.h"

namespace qlora {
namespace {

struct MapCase {
  std::string name;
  const DynamicMap& map;
  std::string golden_file;
};

class DynamicMapTest : public testing::TestWithParam<MapCase> {};

TEST_P(DynamicMapTest, HoldsTheValuesOfBitsandbytes) {
  const auto golden = read_golden_floats(GetParam().golden_file);
  ASSERT_EQ(golden.size(), 256u);
  for (int code = 0; code < 256; ++code) {
    EXPECT_EQ(GetParam().map.decode(static_cast<std::uint8_t>(code)),
              golden[static_cast<std::size_t>(code)])
        << "code " << code;
  }
}

TEST_P(DynamicMapTest, AscendsStrictly) {
  const auto& values = GetParam().map.values;
  EXPECT_EQ(std::adjacent_find(values.begin(), values.end(), std::greater_equal<>()), values.end());
}

TEST_P(DynamicMapTest, EveryEntryEncodesToItsOwnCode) {
  const DynamicMap& map = GetParam().map;
  for (int code = 0; code < 256; ++code) {
    EXPECT_EQ(map.encode(map.decode(static_cast<std::uint8_t>(code))), code);
  }
}

TEST_P(DynamicMapTest, ATieGoesToTheLowerCode) {
  const DynamicMap& map = GetParam().map;
  for (std::size_t i = 0; i < 255; ++i) {
    const float midpoint = static_cast<float>(
        (static_cast<double>(map.values[i]) + static_cast<double>(map.values[i + 1])) / 2.0);
    ASSERT_EQ(map.encode(midpoint), i);
    ASSERT_EQ(map.encode(std::nextafter(midpoint, 2.0f)), i + 1);
  }
}

TEST_P(DynamicMapTest, EncodingFindsTheNearestEntry) {
  const DynamicMap& map = GetParam().map;
  Generator generator(1);
  std::uniform_real_distribution<float> uniform(-1.0f, 1.0f);
  for (int trial = 0; trial < 20000; ++trial) {
    // The fifth power puts the trials where the entries are: near zero.
    const float x = static_cast<float>(std::pow(static_cast<double>(uniform(generator)), 5.0));
    double nearest = HUGE_VAL;
    for (const float entry : map.values) {
      nearest = std::min(nearest, std::fabs(static_cast<double>(entry) - x));
    }
    const double distance = std::fabs(static_cast<double>(map.decode(map.encode(x))) - x);
    // A midpoint is rounded to fp32, by at most 2^-24 of itself, and lies within `nearest` of x.
    ASSERT_LE(distance, nearest + 0x1p-23 * (std::fabs(static_cast<double>(x)) + nearest))
        << "x = " << x;
  }
}

INSTANTIATE_TEST_SUITE_P(
    Maps, DynamicMapTest,
    testing::Values(MapCase{"Signed", signed_dynamic_map, "dynamic_map_signed.bin"},
                    MapCase{"Unsigned", unsigned_dynamic_map, "dynamic_map_unsigned.bin"}),
    [](const auto& instance) { return instance.param.name; });

TEST(DynamicMap, SignedMapHasZeroAt127AndNoMinusOne) {
  EXPECT_EQ(signed_dynamic_map.values[127], 0.0f);
  EXPECT_NEAR(signed_dynamic_map.values.front(), -0.99297, 5e-6);
  EXPECT_EQ(signed_dynamic_map.values.back(), 1.0f);
}

TEST(DynamicMap, ValuesBeyondTheEndsEncodeToTheEnds) {
  EXPECT_EQ(signed_dynamic_map.encode(-1.0f), 0);
  EXPECT_EQ(signed_dynamic_map.encode(1.5f), 255);
  EXPECT_EQ(unsigned_dynamic_map.encode(-0.5f), 0);
  EXPECT_EQ(unsigned_dynamic_map.encode(1.5f), 255);
}

}  // namespace
}  // namespace qlora
