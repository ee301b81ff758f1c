#include "core/tensor_view.h"

#include <gtest/gtest.h>

namespace qlora {
namespace {

TEST(TensorView, ShapesPrintAsLists) {
  EXPECT_EQ(message(Shape{}), "[]");
  EXPECT_EQ(message(Shape{3}), "[3]");
  EXPECT_EQ(message(Shape{3, 0, 5}), "[3, 0, 5]");
}

TEST(TensorView, NumelIsTheProductOfTheSizes) {
  EXPECT_EQ(Shape{}.numel(), 1);
  EXPECT_EQ((Shape{3, 0, 5}).numel(), 0);
  EXPECT_EQ((Shape{128256, 65536}).numel(), 8405385216);
}

TEST(TensorView, ShapesOfDifferentRankDiffer) {
  EXPECT_EQ((Shape{2, 3}), (Shape{2, 3}));
  EXPECT_NE((Shape{2, 3}), (Shape{3, 2}));
  EXPECT_NE((Shape{2}), (Shape{2, 0}));
}

TEST(TensorView, ANinthDimensionIsRefused) {
  Shape shape{1, 2, 3, 4, 5, 6, 7, 8};
  EXPECT_THROW(shape.push_back(9), InvalidArgument);
}

TEST(TensorView, DevicesPrintAsTorchNamesThem) {
  EXPECT_EQ(message(Device{}), "cpu");
  EXPECT_EQ(message(Device{DeviceType::cuda, 3}), "cuda:3");
}

TEST(TensorView, DtypesPrintAsTorchNamesThem) {
  EXPECT_EQ(message(DType::uint8, ' ', DType::int64, ' ', DType::float16, ' ', DType::bfloat16, ' ',
                    DType::float32),
            "uint8 int64 float16 bfloat16 float32");
}

TEST(TensorView, WithFloatTypeMapsEachDtypeToItsType) {
  EXPECT_TRUE(
      with_float_type(DType::float32, []<typename T>(T) { return std::is_same_v<T, float>; }));
  EXPECT_TRUE(
      with_float_type(DType::float16, []<typename T>(T) { return std::is_same_v<T, Float16>; }));
  EXPECT_TRUE(
      with_float_type(DType::bfloat16, []<typename T>(T) { return std::is_same_v<T, BFloat16>; }));
}

TEST(TensorView, WithFloatTypeNamesADtypeThatItDoesNotKnow) {
  try {
    with_float_type(DType::int64, [](auto) {});
    FAIL() << "no error";
  } catch (const Unsupported& error) {
    EXPECT_STREQ(error.what(), "no floating-point kernel for dtype int64");
  }
}

}  // namespace
}  // namespace qlora
