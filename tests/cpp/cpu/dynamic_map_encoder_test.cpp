// The table-driven encoder gives the codes of DynamicMap::encode, which is tested on its own.
#include "cpu/scalar/dynamic_map_encoder.h"

#include <cmath>

#include <gtest/gtest.h>

#include "support/host_tensor.h"

namespace qlora::scalar {
namespace {

void expect_agreement(const DynamicMapEncoder& encoder, const DynamicMap& map) {
  const auto expect_same_code = [&](float x) {
    for (const float signed_x : {x, -x}) {
      ASSERT_EQ(encoder(signed_x), map.encode(signed_x)) << "x = " << signed_x;
    }
  };
  for (std::size_t i = 0; i < dynamic_map_size; ++i) {
    for (const float x : {map.values[i], map.midpoints[std::min<std::size_t>(i, 254)]}) {
      expect_same_code(std::nextafter(x, -2.0f));
      expect_same_code(x);
      expect_same_code(std::nextafter(x, 2.0f));
    }
  }
  // The ends of each bucket: all fp32 whose lower 16 bits are zeros or ones, up to 1.
  for (std::uint32_t upper = 0; upper < 0x3f80; ++upper) {
    expect_same_code(std::bit_cast<float>(upper << 16));
    expect_same_code(std::bit_cast<float>(upper << 16 | 0xffffu));
  }
  expect_same_code(1.0f);
}

TEST(DynamicMapEncoder, OfTheSignedMapAgreesWithTheSearch) {
  expect_agreement(signed_dynamic_map_encoder, signed_dynamic_map);
}

TEST(DynamicMapEncoder, OfTheUnsignedMapAgreesWithTheSearch) {
  expect_agreement(unsigned_dynamic_map_encoder, unsigned_dynamic_map);
}

}  // namespace
}  // namespace qlora::scalar
