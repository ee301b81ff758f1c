// nf4_quantize on shapes of every kind, against its rule computed in fp64, and its errors.
#include <algorithm>
#include <cmath>
#include <limits>

#include "format/nf4.h"
#include "support/expect_error.h"
#include "support/golden.h"
#include "support/stored_weight.h"

namespace qlora {
namespace {

using reference::float32_format;
using reference::round_to;

struct WeightShape {
  std::int64_t n, k;
};

/// Codes by the rule: round(x * round(1 / absmax)) to fp32, then the number of thresholds below it.
std::vector<int> expected_codes(const HostTensor& w, std::int64_t block_size,
                                const std::vector<double>& absmax) {
  static const std::vector<double> levels = read_golden_floats("nf4_levels.bin");
  std::vector<int> out;
  for (std::int64_t e = 0; e < w.numel(); ++e) {
    const double scale = absmax[static_cast<std::size_t>(e / block_size)];
    const double x = round_to(float32_format, w[e] * round_to(float32_format, 1.0 / scale));
    int code = 0;
    for (std::size_t i = 0; i < 15; ++i) {
      code += x > round_to(float32_format, (levels[i] + levels[i + 1]) / 2.0);
    }
    out.push_back(scale == 0.0 ? 7 : code);
  }
  return out;
}

std::vector<double> expected_absmax(const HostTensor& w, std::int64_t block_size) {
  std::vector<double> out(static_cast<std::size_t>((w.numel() + block_size - 1) / block_size));
  for (std::int64_t e = 0; e < w.numel(); ++e) {
    double& block = out[static_cast<std::size_t>(e / block_size)];
    block = std::max(block, std::fabs(w[e]));
  }
  return out;
}

class CpuNF4Quantize : public testing::TestWithParam<DType> {
 protected:
  Generator generator{8};

  StoredWeight quantize(HostTensor& w, WeightShape shape, std::int64_t block_size,
                        bool is_nested = false, int num_threads = 1) {
    StoredWeight weight(shape.n, shape.k, block_size, is_nested);
    nf4_quantize(w.view(), weight.view(), {.num_threads = num_threads});
    return weight;
  }
};

TEST_P(CpuNF4Quantize, FollowsTheRuleForEveryShapeAndBlockSize) {
  const WeightShape shapes[] = {{1, 1},  {1, 2},   {1, 31},   {1, 33},   {7, 1},   {3, 43},
                                {5, 64}, {33, 65}, {17, 241}, {1, 4097}, {129, 67}};
  for (const WeightShape shape : shapes) {
    HostTensor w = HostTensor::random(GetParam(), {shape.n, shape.k}, generator, 0.02);
    for (std::int64_t block_size = 32; block_size <= 4096; block_size *= 2) {
      SCOPED_TRACE(message(shape.n, " x ", shape.k, ", block ", block_size));
      const StoredWeight weight = quantize(w, shape, block_size);
      const std::vector<double> absmax = expected_absmax(w, block_size);
      ASSERT_EQ(weight.scales(), absmax);
      const std::vector<int> codes = expected_codes(w, block_size, absmax);
      for (std::int64_t e = 0; e < w.numel(); ++e) {
        ASSERT_EQ(weight.code(e), codes[static_cast<std::size_t>(e)]) << "element " << e;
      }
    }
  }
}

TEST_P(CpuNF4Quantize, NestingDoesNotChangeTheCodes) {
  HostTensor w = HostTensor::random(GetParam(), {13, 77}, generator);
  EXPECT_EQ(quantize(w, {13, 77}, 32, false).codes.bytes(),
            quantize(w, {13, 77}, 32, true).codes.bytes());
}

TEST_P(CpuNF4Quantize, TheShapeOfTheInputDoesNotMatter) {
  HostTensor w = HostTensor::random(GetParam(), {6, 35}, generator);
  HostTensor flat(GetParam(), {210}, w.values());
  EXPECT_EQ(quantize(w, {6, 35}, 64).codes.bytes(), quantize(flat, {6, 35}, 64).codes.bytes());
}

TEST_P(CpuNF4Quantize, AnOddCountIsPaddedWithTheZeroCodeAsBitsandbytesDoes) {
  HostTensor w(GetParam(), {1, 3}, {0.5, -1.0, 1.0});
  EXPECT_EQ(quantize(w, {1, 3}, 32).codes.bytes(), (std::vector<std::uint8_t>{0xc0, 0xf7}));
}

TEST_P(CpuNF4Quantize, ABlockOfZerosIs0x77AndDecodesToPositiveZero) {
  HostTensor w = HostTensor::random(GetParam(), {4, 32}, generator);
  for (std::int64_t i = 32; i < 64; ++i) w.set(i, i % 2 ? -0.0 : 0.0);
  for (const bool is_nested : {false, true}) {
    StoredWeight weight = quantize(w, {4, 32}, 32, is_nested);
    const auto begin = weight.codes.bytes().begin() + 16;
    EXPECT_TRUE(std::all_of(begin, begin + 16, [](int byte) { return byte == 0x77; }));
    HostTensor out(GetParam(), {4, 32});
    nf4_dequantize(weight.view(), out.view(), {});
    for (std::int64_t i = 32; i < 64; ++i) {
      EXPECT_EQ(out[i], 0.0);
      EXPECT_FALSE(std::signbit(out[i]));
    }
  }
}

TEST_P(CpuNF4Quantize, AWeightOfZerosIsAllZeroCodes) {
  HostTensor w(GetParam(), {3, 43}, std::vector<double>(129, 0.0));
  StoredWeight weight = quantize(w, {3, 43}, 32, true);
  EXPECT_EQ(weight.codes.bytes(), std::vector<std::uint8_t>(65, 0x77));
  EXPECT_EQ(weight.absmax.bytes(), std::vector<std::uint8_t>(5, 127));
  EXPECT_EQ(weight.scales(), std::vector<double>(5, 0.0));
}

TEST_P(CpuNF4Quantize, AnEmptyWeightIsValid) {
  for (const WeightShape shape : {WeightShape{0, 64}, WeightShape{5, 0}, WeightShape{0, 0}}) {
    HostTensor w(GetParam(), {shape.n, shape.k});
    for (const bool is_nested : {false, true}) {
      StoredWeight weight = quantize(w, shape, 64, is_nested);
      nf4_dequantize(weight.view(), w.view(), {});
      if (is_nested) {
        EXPECT_EQ(load_floats(weight.nested_offset)[0], 0.0);
      }
    }
  }
}

TEST_P(CpuNF4Quantize, ASubnormalBlockKeepsItsLevels) {
  // Float16's smallest numbers are normal in fp32; the other two dtypes reach the reciprocal's
  // overflow.
  const double unit = GetParam() == DType::float16 ? 0x1p-24 : 0x1p-133;
  HostTensor w(GetParam(), {1, 4}, {4 * unit, -4 * unit, 0.0, unit});
  const StoredWeight weight = quantize(w, {1, 4}, 32);
  EXPECT_EQ(weight.codes.bytes(), (std::vector<std::uint8_t>{0xf0, 0x7a}));
  EXPECT_EQ(weight.scales(), std::vector<double>{4 * unit});
}

TEST_P(CpuNF4Quantize, NaNOrInfNamesTheBlockAndItsElements) {
  for (const double bad : {std::nan(""), HUGE_VAL, -HUGE_VAL}) {
    HostTensor w = HostTensor::random(GetParam(), {10, 33}, generator);
    w.set(5 * 64 + 3, bad);  // in the last, short block
    expect_invalid(
        "nf4_quantize: w has a NaN or Inf in block 5, elements 320 to 329 of the flattened weight",
        [&] { quantize(w, {10, 33}, 64); });
  }
}

TEST_P(CpuNF4Quantize, EveryPositionOfABlockIsSearchedForNaN) {
  for (std::int64_t position = 0; position < 67; ++position) {
    HostTensor w = HostTensor::random(GetParam(), {1, 67}, generator);
    w.set(position, std::nan(""));
    EXPECT_THROW(quantize(w, {1, 67}, 32), InvalidArgument) << "position " << position;
  }
}

TEST_P(CpuNF4Quantize, TheFirstOfSeveralBadBlocksIsNamedForAnyThreadCount) {
  constexpr WeightShape shape = {64, 4099};  // 8198 blocks of 32, 33 groups
  HostTensor w(GetParam(), {shape.n, shape.k}, std::vector<double>(shape.n * shape.k, 0.5));
  for (const std::int64_t block : {8197, 5001, 5000, 4321}) {
    w.set(block * 32 + 5, block % 2 ? std::nan("") : HUGE_VAL);
    for (const int threads : {1, 2, 3, 7}) {
      SCOPED_TRACE(message("block ", block, ", ", threads, " threads"));
      const std::int64_t last = std::min<std::int64_t>(block * 32 + 31, shape.n * shape.k - 1);
      expect_invalid(message("nf4_quantize: w has a NaN or Inf in block ", block, ", elements ",
                             block * 32, " to ", last, " of the flattened weight"),
                     [&] { quantize(w, shape, 32, true, threads); });
    }
  }
}

TEST(CpuNF4QuantizeTies, AnElementOnAThresholdGetsTheLowerCode) {
  // One element of 1 makes the others their own units of absmax: each threshold and the fp32 on
  // either side of it.
  HostTensor w(DType::float32, {1, 46});
  std::vector<int> codes = {15};
  w.set(0, 1.0);
  for (int i = 0; i < 15; ++i) {
    const float threshold = nf4_threshold(i);
    w.set(3 * i + 1, std::nextafter(threshold, -2.0f));
    w.set(3 * i + 2, threshold);
    w.set(3 * i + 3, std::nextafter(threshold, 2.0f));
    codes.insert(codes.end(), {i, i, i + 1});
  }
  StoredWeight weight(1, 46, 64, false);
  nf4_quantize(w.view(), weight.view(), {});
  for (std::int64_t e = 0; e < 46; ++e) {
    EXPECT_EQ(weight.code(e), codes[static_cast<std::size_t>(e)]) << "element " << e;
  }
}

INSTANTIATE_TEST_SUITE_P(Dtypes, CpuNF4Quantize, float_dtypes, test_name_of);

}  // namespace
}  // namespace qlora
