// Quantising gives bitsandbytes' bytes, bit for bit.
#include "support/golden.h"
#include "support/stored_weight.h"

namespace qlora {
namespace {

using Bytes = std::vector<std::uint8_t>;

/// What a golden file holds for one block size.
struct GoldenWeight {
  Bytes codes, absmax, nested_offset, nested_absmax, nested_codes, nested_scales;
};

GoldenWeight read_golden_weight(DType dtype, std::int64_t wanted_block_size) {
  const Bytes file = read_golden(std::string("nf4_") + name_of(dtype) + ".bin");
  std::size_t position = 0;
  const auto take = [&](std::int64_t count) {
    const auto begin = file.begin() + static_cast<std::ptrdiff_t>(position);
    position += static_cast<std::size_t>(count);
    return Bytes(begin, begin + count);
  };
  GoldenWeight golden, found;
  for (const std::int64_t block_size : golden_block_sizes) {
    const std::int64_t elements = golden_n * golden_k;
    const std::int64_t blocks = (elements + block_size - 1) / block_size;
    golden.codes = take((elements + 1) / 2);
    golden.absmax = take(4 * blocks);
    golden.nested_offset = take(4);
    golden.nested_absmax = take(4 * ((blocks + 255) / 256));
    golden.nested_codes = take(blocks);
    golden.nested_scales = take(4 * blocks);
    if (block_size == wanted_block_size) found = golden;
  }
  EXPECT_EQ(position, file.size());
  return found;
}

class CpuNF4Golden : public testing::TestWithParam<std::tuple<DType, std::int64_t>> {
 protected:
  const DType dtype = std::get<0>(GetParam());
  const std::int64_t block_size = std::get<1>(GetParam());
  const GoldenWeight golden = read_golden_weight(dtype, block_size);
  HostTensor input = make_golden_input(dtype);

  StoredWeight quantize(bool is_nested) {
    StoredWeight weight(golden_n, golden_k, block_size, is_nested);
    nf4_quantize(input.view(), weight.view(), {});
    return weight;
  }
};

TEST_P(CpuNF4Golden, PlainWeightHasTheGoldenCodesAndScales) {
  const StoredWeight weight = quantize(false);
  EXPECT_EQ(weight.codes.bytes(), golden.codes);
  EXPECT_EQ(weight.absmax.bytes(), golden.absmax);
}

TEST_P(CpuNF4Golden, NestedWeightHasTheGoldenCodesAndScales) {
  const StoredWeight weight = quantize(true);
  EXPECT_EQ(weight.codes.bytes(), golden.codes);
  EXPECT_EQ(weight.absmax.bytes(), golden.nested_codes);
  EXPECT_EQ(weight.nested_absmax.bytes(), golden.nested_absmax);
  EXPECT_EQ(weight.nested_offset.bytes(), golden.nested_offset);
}

TEST_P(CpuNF4Golden, ScalesDecodeToTheGoldenOnes) {
  for (const bool is_nested : {false, true}) {
    StoredWeight weight = quantize(is_nested);
    HostTensor scales(DType::float32, {weight.block_count()});
    nf4_dequantize_absmax(weight.view(), scales.view(), {});
    EXPECT_EQ(scales.bytes(), is_nested ? golden.nested_scales : golden.absmax);
  }
}

INSTANTIATE_TEST_SUITE_P(Weights, CpuNF4Golden,
                         testing::Combine(float_dtypes, testing::ValuesIn(golden_block_sizes)),
                         [](const auto& instance) {
                           return std::string(name_of(std::get<0>(instance.param))) + "Block" +
                                  std::to_string(std::get<1>(instance.param));
                         });

}  // namespace
}  // namespace qlora
