// The merged tables of the vector sets, with the arithmetic of one lane, give the codes of
// DynamicMap::encode.
#include "cpu/simd/dynamic_map_tables.h"

#include <algorithm>
#include <cmath>

#include <gtest/gtest.h>

namespace qlora::simd {
namespace {

template <typename Table>
int look_up_code(const Table& table, std::uint32_t key) {
  const std::uint32_t word = key >> 16;
  const std::uint32_t limited_word =
      word < dynamic_map_first_key_word
          ? 0
          : std::min(word - dynamic_map_first_key_word, dynamic_map_last_key_word);
  const std::uint32_t limited = limited_word << 16 | (key & 0xffff);
  return static_cast<int>((table.entries[limited >> Table::shift] + limited) >> Table::shift);
}

int encode_signed(float x) {
  const auto bits = std::bit_cast<std::uint32_t>(x);
  const int code = look_up_code(signed_dynamic_map_table, std::rotl(bits, 1));
  return bits >> 31 ? std::max(0, 2 * dynamic_map_signed_zero_code - code) : code;
}

int encode_unsigned(float x) {
  return look_up_code(unsigned_dynamic_map_table, std::bit_cast<std::uint32_t>(x) << 1);
}

void expect_same_codes(float magnitude) {
  ASSERT_EQ(encode_signed(magnitude), signed_dynamic_map.encode(magnitude)) << magnitude;
  ASSERT_EQ(encode_signed(-magnitude), signed_dynamic_map.encode(-magnitude)) << -magnitude;
  ASSERT_EQ(encode_unsigned(magnitude), std::max<int>(1, unsigned_dynamic_map.encode(magnitude)))
      << magnitude;
}

TEST(DynamicMapTables, GiveTheCodesAtEveryMidpointAndBucketEdge) {
  for (const DynamicMap* map : {&signed_dynamic_map, &unsigned_dynamic_map}) {
    for (const float midpoint : map->midpoints) {
      const float x = std::fabs(midpoint);
      for (const float near : {std::nextafter(x, 0.0f), x, std::nextafter(x, 2.0f)}) {
        expect_same_codes(near);
      }
    }
  }
  // All fp32 whose lower 15 bits are zeros or ones, subnormals and zero among them.
  for (std::uint32_t upper = 0; upper < 0x3f800000u >> 15; ++upper) {
    expect_same_codes(std::bit_cast<float>(upper << 15));
    expect_same_codes(std::bit_cast<float>(upper << 15 | 0x7fffu));
  }
  expect_same_codes(1.0f);
}

TEST(DynamicMapTables, GiveTheLastCodeBeyondOne) {
  for (const float x : {1.5f, HUGE_VALF, std::nanf("")}) {
    EXPECT_EQ(encode_signed(std::copysign(x, 1.0f)), 255);
    EXPECT_EQ(encode_signed(std::copysign(x, -1.0f)), 0);
    EXPECT_EQ(encode_unsigned(std::copysign(x, 1.0f)), 255);
  }
}

// A minute: all 2^30 magnitudes. Run by name after a change of the tables.
TEST(DynamicMapTables, DISABLED_GiveTheCodesOfEveryFloat) {
  for (std::uint32_t bits = 0; bits <= 0x3f800000u; ++bits) {
    expect_same_codes(std::bit_cast<float>(bits));
    if (testing::Test::HasFatalFailure()) return;
  }
}

}  // namespace
}  // namespace qlora::simd
