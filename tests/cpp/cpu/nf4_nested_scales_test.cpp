// Double quantisation: the offset's rule of summation, and the nested codes. Scales are set through
// weights whose blocks have one non-zero element each, so that absmax is what the test says.
#include <algorithm>
#include <cmath>

#include "support/golden.h"
#include "support/stored_weight.h"

namespace qlora {
namespace {

using reference::float32_format;
using reference::round_to;

StoredWeight quantize_with_absmax(const std::vector<double>& absmax) {
  const auto blocks = static_cast<std::int64_t>(absmax.size());
  HostTensor w(DType::float32, {blocks, 32}, std::vector<double>(absmax.size() * 32, 0.0));
  for (std::int64_t b = 0; b < blocks; ++b) w.set(32 * b, absmax[static_cast<std::size_t>(b)]);
  StoredWeight weight(blocks, 32, 32, true);
  nf4_quantize(w.view(), weight.view(), {});
  return weight;
}

double offset_of(const std::vector<double>& absmax) {
  return load_floats(quantize_with_absmax(absmax).nested_offset)[0];
}

TEST(CpuNF4NestedScales, OffsetIsNotSummedInFp32) {
  std::vector<double> absmax(512, 1.0);
  absmax[0] = 0x1p24;  // in fp32, 2^24 + 1 is 2^24: a running fp32 sum would lose all the ones
  float naive = 0.0f;
  for (const double value : absmax) naive += static_cast<float>(value);
  const double want = round_to(float32_format, (0x1p24 + 511.0) / 512.0);
  ASSERT_NE(static_cast<double>(naive / 512.0f), want);
  EXPECT_EQ(offset_of(absmax), want);
}

// 2^60 + 2^36 is a tie between two fp32 (the even one is 2^60), so the least addition decides the
// rounding. In fp64, 2^60 + 100 is 2^60: whether 255 or 256 times 100 count depends on the order of
// summation alone.
constexpr double big = 0x1p60, to_the_tie = 0x1p36, small = 100.0;

TEST(CpuNF4NestedScales, OffsetSumsEachRunOf256BeforeItAddsTheRuns) {
  std::vector<double> absmax(512, 0.0);
  absmax[0] = big;
  absmax[1] = to_the_tie;
  std::fill(absmax.begin() + 256, absmax.end(), small);
  double in_one_run = 0.0;
  for (const double value : absmax) in_one_run += value;
  ASSERT_EQ(in_one_run, big + to_the_tie);  // one running fp64 sum would round down
  EXPECT_EQ(offset_of(absmax), (big + 0x1p37) / 512.0);
}

TEST(CpuNF4NestedScales, OffsetSumsARunInIndexOrder) {
  std::vector<double> absmax(512, 0.0);
  absmax[0] = big;
  absmax[1] = to_the_tie;
  std::fill(absmax.begin() + 2, absmax.begin() + 256, small);  // lost, one by one
  EXPECT_EQ(offset_of(absmax), big / 512.0);
  std::rotate(absmax.begin(), absmax.begin() + 2,
              absmax.begin() + 256);  // now the small ones first
  EXPECT_EQ(offset_of(absmax), (big + 0x1p37) / 512.0);
}

TEST(CpuNF4NestedScales, CodesAndGroupAbsmaxFollowTheRule) {
  const auto map = read_golden_floats("dynamic_map_signed.bin");
  Generator generator(9);
  std::uniform_real_distribution<double> uniform(0.1, 4.0);
  for (const std::size_t blocks : {1u, 2u, 255u, 256u, 257u, 700u}) {
    SCOPED_TRACE(blocks);
    std::vector<double> absmax(blocks);
    for (double& value : absmax) value = round_to(float32_format, uniform(generator));
    const StoredWeight weight = quantize_with_absmax(absmax);
    const double offset = load_floats(weight.nested_offset)[0];
    const std::vector<double> group_absmax = load_floats(weight.nested_absmax);
    for (std::size_t first = 0; first < blocks; first += 256) {
      std::vector<double> centred;
      for (std::size_t b = first; b < std::min(first + 256, blocks); ++b) {
        centred.push_back(round_to(float32_format, absmax[b] - offset));
      }
      double want_absmax = 0.0;
      for (const double c : centred) want_absmax = std::max(want_absmax, std::fabs(c));
      ASSERT_EQ(group_absmax[first / 256], want_absmax);
      const double reciprocal = round_to(float32_format, 1.0 / want_absmax);
      for (std::size_t i = 0; i < centred.size(); ++i) {
        int code = want_absmax > 0.0 ? 0 : 127;
        for (std::size_t j = 0; j < 255 && want_absmax > 0.0; ++j) {
          code += round_to(float32_format, centred[i] * reciprocal) >
                  round_to(float32_format, (map[j] + map[j + 1]) / 2.0);
        }
        ASSERT_EQ(weight.absmax.bytes()[first + i], code) << "block " << first + i;
      }
    }
  }
}

TEST(CpuNF4NestedScales, EqualScalesAreStoredExactly) {
  const StoredWeight weight = quantize_with_absmax(std::vector<double>(300, 0.75));
  EXPECT_EQ(weight.absmax.bytes(), std::vector<std::uint8_t>(300, 127));
  EXPECT_EQ(load_floats(weight.nested_absmax), (std::vector<double>{0.0, 0.0}));
  EXPECT_EQ(weight.scales(), std::vector<double>(300, 0.75));
}

}  // namespace
}  // namespace qlora
