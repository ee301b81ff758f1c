#include "format/nf4_layout.h"

#include <vector>

#include <gtest/gtest.h>

namespace qlora {
namespace {

TEST(NF4Layout, BlockSizesArePowersOfTwoFrom32To4096) {
  for (const std::int64_t size : {32, 64, 128, 256, 512, 1024, 2048, 4096}) {
    EXPECT_TRUE(is_nf4_block_size(size)) << size;
  }
  for (const std::int64_t size : {-64, 0, 1, 16, 31, 33, 48, 96, 4095, 4097, 8192}) {
    EXPECT_FALSE(is_nf4_block_size(size)) << size;
  }
}

TEST(NF4Layout, CountsRoundUp) {
  EXPECT_EQ(nf4_code_bytes(0), 0);
  EXPECT_EQ(nf4_code_bytes(1), 1);
  EXPECT_EQ(nf4_code_bytes(2), 1);
  EXPECT_EQ(nf4_code_bytes(8517), 4259);
  EXPECT_EQ(nf4_block_count(0, 64), 0);
  EXPECT_EQ(nf4_block_count(64, 64), 1);
  EXPECT_EQ(nf4_block_count(65, 64), 2);
  EXPECT_EQ(nf4_nested_block_count(256), 1);
  EXPECT_EQ(nf4_nested_block_count(257), 2);
}

TEST(NF4Layout, CountsHoldBeyond32Bits) {
  const std::int64_t elements = std::int64_t{128256} * 65536;  // above 2^32
  EXPECT_EQ(nf4_code_bytes(elements), 4202692608);
  EXPECT_EQ(nf4_block_count(elements, 64), 131334144);
  EXPECT_EQ(nf4_nested_block_count(131334144), 513024);
}

TEST(NF4Layout, Block64TakesTheDocumentedBitsPerWeight) {
  const std::int64_t elements = 4096 * 4096, blocks = nf4_block_count(elements, 64);
  const double nested =
      static_cast<double>(nf4_code_bytes(elements) + blocks + 4 * nf4_nested_block_count(blocks));
  const double plain = static_cast<double>(nf4_code_bytes(elements) + 4 * blocks);
  EXPECT_NEAR(8.0 * nested / static_cast<double>(elements), 4.127, 0.0005);
  EXPECT_DOUBLE_EQ(8.0 * plain / static_cast<double>(elements), 4.5);
}

TEST(NF4Layout, EvenElementsAreHighNibbles) {
  const std::vector<std::uint8_t> codes = {nf4_pack(0x1, 0x2), nf4_pack(0xf, 0x0)};
  EXPECT_EQ(codes[0], 0x12);
  EXPECT_EQ(codes[1], 0xf0);
  const int want[] = {0x1, 0x2, 0xf, 0x0};
  for (int e = 0; e < 4; ++e) EXPECT_EQ(nf4_code_at(codes.data(), e), want[e]);
}

TEST(NF4Layout, FloatsNeedNoAlignment) {
  std::vector<std::uint8_t> bytes(13);
  store_float(bytes.data() + 1, 2, 1.5f);
  EXPECT_EQ(load_float(bytes.data() + 1, 2), 1.5f);
  EXPECT_EQ(bytes[11], 0xc0);  // 1.5f is 0x3fc00000, the low byte first
  EXPECT_EQ(bytes[12], 0x3f);
}

TEST(NF4Layout, NestedScalesRoundTheProductBeforeTheSum) {
  // With a = map[200] and these two numbers, fma(a, b, c) differs from (a * b) + c in the last bit.
  const float a = signed_dynamic_map.decode(200);
  float b = 1.0f, c = 1.0f;
  bool is_distinguishing = false;
  for (int i = 1; i < 1000 && !is_distinguishing; ++i) {
    b = 1.0f + static_cast<float>(i) * 0x1p-20f;
    const double exact = static_cast<double>(a) * b + c;
    is_distinguishing =
        static_cast<float>(exact) != static_cast<float>(static_cast<double>(a) * b) + c;
  }
  ASSERT_TRUE(is_distinguishing);

  std::uint8_t code = 200, nested_absmax[4], nested_offset[4];
  store_float(nested_absmax, 0, b);
  store_float(nested_offset, 0, c);
  const NF4Bytes weight = {nullptr, &code, nested_absmax, nested_offset, 1, 32, 32};
  const float product = static_cast<float>(static_cast<double>(a) * b);
  EXPECT_EQ(weight.scale(0), static_cast<float>(static_cast<double>(product) + c));
}

TEST(NF4Layout, EachNestedScaleUsesTheAbsmaxOfIts256Blocks) {
  std::vector<std::uint8_t> codes(300, 255);  // map[255] = 1
  std::uint8_t nested_absmax[8], nested_offset[4];
  store_float(nested_absmax, 0, 2.0f);
  store_float(nested_absmax, 1, 3.0f);
  store_float(nested_offset, 0, 0.5f);
  const NF4Bytes weight = {nullptr, codes.data(), nested_absmax, nested_offset, 300, 32, 32};
  EXPECT_EQ(weight.block_count(), 300);
  EXPECT_EQ(weight.scale(255), 2.5f);
  EXPECT_EQ(weight.scale(256), 3.5f);
}

}  // namespace
}  // namespace qlora
