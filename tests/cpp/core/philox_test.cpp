#include "core/philox.h"

#include <gtest/gtest.h>

namespace qlora {
namespace {

void expect_words(const PhiloxWords& actual, const PhiloxWords& want) {
  for (int i = 0; i < 4; ++i) EXPECT_EQ(actual.word[i], want.word[i]) << "word " << i;
}

// The known answers of philox4x32-10 that Random123 ships (kat_vectors).
TEST(Philox, KnownAnswerOfZeros) {
  expect_words(philox4x32({{0, 0, 0, 0}}, 0),
               {{0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u}});
}

TEST(Philox, KnownAnswerOfOnes) {
  expect_words(philox4x32({{~0u, ~0u, ~0u, ~0u}}, ~std::uint64_t{0}),
               {{0x408f276du, 0x41c83b0eu, 0xa20bc7c6u, 0x6d5451fdu}});
}

TEST(Philox, KnownAnswerOfTheDigitsOfPi) {
  // The key's words are a4093822 and 299f31d0, the first one low.
  expect_words(
      philox4x32({{0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u}}, 0x299f31d0a4093822u),
      {{0xd16cfe09u, 0x94fdccebu, 0x5001e420u, 0x24126ea1u}});
}

TEST(DropoutMask, CountersUseAll64Bits) {
  const DropoutMask mask(0.5, 7);
  expect_words(mask.words_of_four(0x123456789abcdefu),
               philox4x32({{0x89abcdefu, 0x01234567u, 0, 0}}, 7));
}

TEST(DropoutMask, KeepsWordsFromPTimes2To32) {
  const DropoutMask mask(0.25, 0);
  EXPECT_FALSE(mask.keeps(0x3fffffffu));
  EXPECT_TRUE(mask.keeps(0x40000000u));
  EXPECT_FLOAT_EQ(mask.keep_scale, 4.0f / 3.0f);
}

TEST(DropoutMask, ZeroProbabilityKeepsEveryWord) {
  const DropoutMask mask(0.0, 0);
  EXPECT_TRUE(mask.keeps(0));
  EXPECT_EQ(mask.keep_scale, 1.0f);
}

TEST(DropoutMask, NegativeSeedsAreKeysLikeAnyOther) {
  expect_words(DropoutMask(0.5, -1).words_of_four(0), philox4x32({{0, 0, 0, 0}}, ~0ull));
}

}  // namespace
}  // namespace qlora
