// The table of the vector and CUDA quantisers says what nf4_encode says.
#include "format/nf4_encode_table.h"

#include <bit>
#include <cmath>

#include <gtest/gtest.h>

namespace qlora {
namespace {

std::uint32_t encode_by_table(float x) {
  const std::uint32_t bin = nf4_bin(x) % nf4_bin_count;
  return nf4_encode_table.base[bin] + (x > nf4_encode_table.threshold[bin]);
}

constexpr float largest = 0x1.000002p0f;  // x * (1 / absmax) can exceed 1 by a bit

TEST(NF4EncodeTable, AgreesAroundEveryThresholdAndLevel) {
  const auto check_around = [](float center) {
    float x = center;
    for (int i = 0; i < 1000; ++i) x = std::nextafter(x, -2.0f);
    for (int i = 0; i < 2000; ++i, x = std::nextafter(x, 2.0f)) {
      if (std::fabs(x) > largest) continue;
      ASSERT_EQ(encode_by_table(x), nf4_encode(x)) << x;
    }
  };
  for (int i = 0; i < nf4_level_count; ++i) check_around(nf4_level(i));
  for (int i = 0; i + 1 < nf4_level_count; ++i) check_around(nf4_threshold(i));
}

TEST(NF4EncodeTable, AgreesAroundEveryEdgeOfABin) {
  for (int i = -15; i < 15; ++i) {
    float x = (static_cast<float>(i) + 0.5f) / 15.0f;
    for (int step = 0; step < 100; ++step) x = std::nextafter(x, -2.0f);
    for (int step = 0; step < 200; ++step, x = std::nextafter(x, 2.0f)) {
      ASSERT_EQ(encode_by_table(x), nf4_encode(x)) << x;
    }
  }
}

TEST(NF4EncodeTable, AgreesOverTheWholeRange) {
  // Every 4099th fp32 from 0 to 1, with both signs: a million of them, of all exponents.
  for (std::uint32_t bits = 0; bits <= std::bit_cast<std::uint32_t>(largest); bits += 4099) {
    const float x = std::bit_cast<float>(bits);
    ASSERT_EQ(encode_by_table(x), nf4_encode(x)) << x;
    ASSERT_EQ(encode_by_table(-x), nf4_encode(-x)) << -x;
  }
}

TEST(NF4EncodeTable, UsesEveryBinButTheFirst) {
  EXPECT_EQ(nf4_bin(-largest) % nf4_bin_count, 1u);
  EXPECT_EQ(nf4_bin(0.0f) % nf4_bin_count, 16u);
  EXPECT_EQ(nf4_bin(largest) % nf4_bin_count, 31u);
}

}  // namespace
}  // namespace qlora
