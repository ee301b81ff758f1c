// nf4_dequantize and nf4_dequantize_absmax of arbitrary bytes: every rounding is fixed, so equality
// is exact.
#include "support/stored_weight.h"

namespace qlora {
namespace {

struct Case {
  std::int64_t n, k, block_size;
};
constexpr Case cases[] = {{1, 1, 32},    {1, 63, 64},  {3, 43, 32},     {64, 1, 4096},
                          {5, 129, 128}, {65, 64, 64}, {2, 4096, 4096}, {7, 2341, 2048},
                          {19, 511, 32}, {0, 64, 64},  {3, 0, 64}};

class CpuNF4Dequantize : public testing::TestWithParam<DType> {
 protected:
  Generator generator{10};
};

TEST_P(CpuNF4Dequantize, IsTheLevelTimesAbsmaxRoundedToFp32AndThenToTheOutput) {
  for (const Case& c : cases) {
    for (const bool is_nested : {false, true}) {
      SCOPED_TRACE(message(c.n, " x ", c.k, ", block ", c.block_size, ", nested ", is_nested));
      StoredWeight weight = StoredWeight::random(c.n, c.k, c.block_size, is_nested, generator);
      HostTensor out(GetParam(), {c.n, c.k});
      nf4_dequantize(weight.view(), out.view(), {});
      ASSERT_EQ(out.values(), weight.decode(format_of(GetParam())).values);
    }
  }
}

TEST_P(CpuNF4Dequantize, TheShapeOfTheOutputDoesNotMatter) {
  StoredWeight weight = StoredWeight::random(6, 35, 32, true, generator);
  HostTensor matrix(GetParam(), {6, 35}), other(GetParam(), {7, 5, 6});
  nf4_dequantize(weight.view(), matrix.view(), {});
  nf4_dequantize(weight.view(), other.view(), {});
  EXPECT_EQ(matrix.bytes(), other.bytes());
}

TEST_P(CpuNF4Dequantize, TheNibbleThatPadsAnOddCountIsIgnored) {
  StoredWeight weight = StoredWeight::random(3, 43, 32, false, generator);
  HostTensor first(GetParam(), {3, 43}), second(GetParam(), {3, 43});
  nf4_dequantize(weight.view(), first.view(), {});
  weight.codes.bytes().back() ^= 0x0f;
  nf4_dequantize(weight.view(), second.view(), {});
  EXPECT_EQ(first.bytes(), second.bytes());
}

TEST_P(CpuNF4Dequantize, ScalesNeedNoAlignment) {
  StoredWeight weight = StoredWeight::random(4, 64, 32, false, generator);
  std::vector<std::uint8_t> shifted(weight.absmax.bytes().size() + 1);
  std::copy(weight.absmax.bytes().begin(), weight.absmax.bytes().end(), shifted.begin() + 1);
  NF4Weight view = weight.view();
  view.absmax.data = shifted.data() + 1;
  HostTensor out(GetParam(), {4, 64});
  nf4_dequantize(view, out.view(), {});
  EXPECT_EQ(out.values(), weight.decode(format_of(GetParam())).values);
}

INSTANTIATE_TEST_SUITE_P(Dtypes, CpuNF4Dequantize, float_dtypes, test_name_of);

TEST(CpuNF4DequantizeAbsmax, IsTheScaleOfEachBlock) {
  Generator generator(11);
  for (const Case& c : cases) {
    for (const bool is_nested : {false, true}) {
      StoredWeight weight = StoredWeight::random(c.n, c.k, c.block_size, is_nested, generator);
      HostTensor out(DType::float32, {weight.block_count()});
      nf4_dequantize_absmax(weight.view(), out.view(), {});
      EXPECT_EQ(out.values(), weight.scales());
    }
  }
}

}  // namespace
}  // namespace qlora
