#include <algorithm>

#include "support/expect_error.h"
#include "support/stored_weight.h"

namespace qlora {
namespace {

constexpr Device cuda0 = {DeviceType::cuda, 0};

/// Valid arguments of the codec's operations: 160 elements in 5 blocks of 32. A test spoils one of
/// them.
class CodecValidation : public testing::Test {
 protected:
  Generator generator{4};
  HostTensor w_memory = HostTensor::random(DType::float32, {4, 40}, generator);
  HostTensor absmax_memory{DType::float32, {5}};
  StoredWeight nested_memory{4, 40, 32, true}, plain_memory{4, 40, 32, false};

  TensorView w = w_memory.view(), absmax_out = absmax_memory.view();
  NF4Weight weight = nested_memory.view(), plain = plain_memory.view();

  void expect_quantize_error(const std::string& text) {
    expect_invalid("nf4_quantize: " + text, [&] { nf4_quantize(w, weight, {}); });
    const auto is_poison = [](std::uint8_t byte) { return byte == 0xff; };
    EXPECT_TRUE(std::all_of(nested_memory.codes.bytes().begin(), nested_memory.codes.bytes().end(),
                            is_poison))
        << "an output was touched";
  }
  void expect_dequantize_error(const std::string& text) {
    expect_invalid("nf4_dequantize: " + text, [&] { nf4_dequantize(weight, w, {}); });
  }
  void expect_absmax_error(const std::string& text) {
    expect_invalid("nf4_dequantize_absmax: " + text,
                   [&] { nf4_dequantize_absmax(weight, absmax_out, {}); });
  }
};

TEST_F(CodecValidation, TheUnspoiledArgumentsAreValid) {
  nf4_quantize(w, plain, {});
  nf4_quantize(w, weight, {});
  nf4_dequantize(weight, w, {});
  nf4_dequantize_absmax(weight, absmax_out, {});
}

TEST_F(CodecValidation, QuantizeRefusesAMissingInput) {
  w.is_present = false;
  expect_quantize_error("w is missing");
}
TEST_F(CodecValidation, QuantizeRefusesAnInputThatIsNotContiguous) {
  w.is_contiguous = false;
  expect_quantize_error("w of shape [4, 40] is not contiguous; pass w.contiguous()");
}
TEST_F(CodecValidation, QuantizeRefusesAnIntegerInput) {
  w.dtype = DType::uint8;
  expect_quantize_error("w is uint8, want float32, bfloat16 or float16");
}
TEST_F(CodecValidation, QuantizeRefusesAnInputOfTheWrongSize) {
  w.shape = {4, 41};
  expect_quantize_error("w of shape [4, 41] has 164 elements, want 160");
}
TEST_F(CodecValidation, QuantizeRefusesOtherBlockSizes) {
  for (const std::int64_t size : {48, 16, 8192, 0, -64}) {
    weight.block_size = size;
    expect_quantize_error("block_size is " + std::to_string(size) +
                          ", want a power of two from 32 to 4096");
  }
}
TEST_F(CodecValidation, QuantizeRefusesNegativeSizes) {
  weight.k = -40;
  expect_quantize_error("the weight has shape [4, -40], want sizes of at least 0");
}
TEST_F(CodecValidation, QuantizeRefusesCodesOnAnotherDevice) {
  weight.codes.device = cuda0;
  expect_quantize_error("codes is on cuda:0, but the other tensors are on cpu");
}
TEST_F(CodecValidation, QuantizeRefusesCodesThatAreNotContiguous) {
  weight.codes.is_contiguous = false;
  expect_quantize_error("codes of shape [80] is not contiguous; pass codes.contiguous()");
}

TEST_F(CodecValidation, DequantizeRefusesMissingCodes) {
  weight.codes.is_present = false;
  expect_dequantize_error("codes is missing");
}
TEST_F(CodecValidation, DequantizeRefusesCodesOfTheWrongDtype) {
  weight.codes.dtype = DType::float32;
  expect_dequantize_error("codes is float32, want uint8");
}
TEST_F(CodecValidation, DequantizeRefusesCodesOfTheWrongSize) {
  weight.codes.shape = {79};
  expect_dequantize_error("codes of shape [79] has 79 elements, want 80");
}
TEST_F(CodecValidation, DequantizeRefusesScalesOfTheWrongSize) {
  weight.absmax.shape = {20};
  expect_dequantize_error("absmax of shape [20] has 20 elements, want 5");
}
TEST_F(CodecValidation, DequantizeRefusesPlainScalesOfTheWrongSize) {
  weight = plain;
  weight.absmax.shape = {5};
  expect_dequantize_error("absmax of shape [5] has 5 elements, want 20");
}
TEST_F(CodecValidation, DequantizeRefusesPlainScalesAsFloats) {
  weight = plain;
  weight.absmax.dtype = DType::float32;
  expect_dequantize_error("absmax is float32, want uint8");
}
TEST_F(CodecValidation, DequantizeRefusesNestedScalesWithoutAnOffset) {
  weight.nested_offset.is_present = false;
  expect_dequantize_error("nested_absmax and nested_offset come together or not at all");
}
TEST_F(CodecValidation, DequantizeRefusesAnOffsetWithoutNestedScales) {
  weight.nested_absmax.is_present = false;
  expect_dequantize_error("nested_absmax and nested_offset come together or not at all");
}
TEST_F(CodecValidation, DequantizeRefusesNestedScalesOfTheWrongSize) {
  weight.nested_absmax.shape = {8};
  expect_dequantize_error("nested_absmax of shape [8] has 8 elements, want 4");
}
TEST_F(CodecValidation, DequantizeRefusesAnOffsetOfTheWrongSize) {
  weight.nested_offset.shape = {1};
  expect_dequantize_error("nested_offset of shape [1] has 1 elements, want 4");
}
TEST_F(CodecValidation, DequantizeRefusesAnIntegerOutput) {
  w.dtype = DType::int64;
  expect_dequantize_error("out is int64, want float32, bfloat16 or float16");
}
TEST_F(CodecValidation, DequantizeRefusesAnOutputOfTheWrongSize) {
  w.shape = {159};
  expect_dequantize_error("out of shape [159] has 159 elements, want 160");
}
TEST_F(CodecValidation, DequantizeRefusesAnOutputOnAnotherDevice) {
  w.device = {DeviceType::cuda, 1};
  expect_dequantize_error("out is on cuda:1, but the other tensors are on cpu");
}

TEST_F(CodecValidation, DequantizeAbsmaxRefusesOtherDtypes) {
  absmax_out.dtype = DType::bfloat16;
  expect_absmax_error("out is bfloat16, want float32");
}
TEST_F(CodecValidation, DequantizeAbsmaxRefusesAnOutputOfTheWrongSize) {
  absmax_out.shape = {6};
  expect_absmax_error("out of shape [6] has 6 elements, want 5");
}
TEST_F(CodecValidation, DequantizeAbsmaxRefusesABadWeight) {
  weight.block_size = 48;
  expect_absmax_error("block_size is 48, want a power of two from 32 to 4096");
}

}  // namespace
}  // namespace qlora
