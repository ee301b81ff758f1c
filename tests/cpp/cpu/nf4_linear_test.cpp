// nf4_linear and nf4_linear_grad_input against fp64 products with the decoded weight.
#include <algorithm>
#include <cmath>

#include "support/stored_weight.h"

namespace qlora {
namespace {

using reference::Matrix;
using reference::sum_error;

struct LinearShape {
  std::int64_t m, n, k, block_size;
};

// One token; one element; one block; k odd and no multiple of the block; rows that begin within a
// byte; n = 1; more tokens than a kernel's tile; a block longer than the weight; sizes of zero.
//
// The last lines are rows of whole halves of a SIMD kernel's chunk of 128: one half; an odd number of
// them; blocks that straddle rows; tokens, rows and columns around multiples of 6, 8, 16 and 32, more
// than one panel of each, more tokens than are packed at once.
constexpr LinearShape shapes[] = {
    {1, 1, 1, 32},      {1, 3, 5, 32},      {1, 8, 64, 64},     {2, 1, 33, 32},
    {3, 17, 31, 64},    {4, 5, 97, 32},     {5, 9, 255, 128},   {65, 7, 66, 64},
    {130, 3, 40, 32},   {2, 33, 257, 4096}, {1, 2, 4099, 64},   {6, 64, 128, 256},
    {0, 4, 64, 64},     {3, 0, 64, 64},     {3, 4, 0, 64},      {3, 5, 64, 64},
    {1, 1, 128, 64},    {2, 33, 192, 64},   {8, 16, 320, 128},  {9, 31, 448, 256},
    {16, 32, 640, 64},  {17, 15, 64, 4096}, {31, 300, 192, 64}, {33, 47, 576, 64},
    {4, 530, 128, 512}, {48, 17, 1088, 64}, {531, 34, 192, 64},
};

class CpuNF4Linear : public testing::TestWithParam<std::tuple<DType, bool>> {
 protected:
  const DType dtype = std::get<0>(GetParam());
  const bool is_nested = std::get<1>(GetParam());
  Generator generator{13};

  template <typename Test>
  void for_each_shape(Test&& test) {
    for (const LinearShape& shape : shapes) {
      SCOPED_TRACE(
          message("m=", shape.m, " n=", shape.n, " k=", shape.k, " block ", shape.block_size));
      StoredWeight weight =
          StoredWeight::random(shape.n, shape.k, shape.block_size, is_nested, generator);
      test(shape, weight, weight.decode(format_of(dtype)));
    }
  }
};

TEST_P(CpuNF4Linear, ForwardIsXTimesWTransposed) {
  for_each_shape([&](const LinearShape& shape, StoredWeight& weight, const Matrix& w) {
    HostTensor x = HostTensor::random(dtype, {shape.m, shape.k}, generator);
    HostTensor y(dtype, {shape.m, shape.n});
    nf4_linear(x.view(), weight.view(), {}, y.view(), {});
    const Matrix exact = x.matrix() * transpose(w);
    const Matrix size = magnitude(x.matrix()) * magnitude(transpose(w));
    EXPECT_TRUE(is_rounded_from(y, exact.values, (sum_error(shape.k) * size).values));
  });
}

TEST_P(CpuNF4Linear, ForwardAddsTheBiasBeforeItRounds) {
  for_each_shape([&](const LinearShape& shape, StoredWeight& weight, const Matrix& w) {
    HostTensor x = HostTensor::random(dtype, {shape.m, shape.k}, generator);
    HostTensor bias = HostTensor::random(dtype, {shape.n}, generator);
    HostTensor y(dtype, {shape.m, shape.n});
    nf4_linear(x.view(), weight.view(), bias.view(), y.view(), {});
    // A bias is one more column of W, beside a column of ones in x.
    const Matrix ones(shape.m, 1, std::vector<double>(static_cast<std::size_t>(shape.m), 1.0));
    const Matrix row(1, shape.n, bias.values());
    const Matrix exact = x.matrix() * transpose(w) + ones * row;
    const Matrix size = magnitude(x.matrix()) * magnitude(transpose(w)) + ones * magnitude(row);
    EXPECT_TRUE(is_rounded_from(y, exact.values, (sum_error(shape.k + 1) * size).values));
  });
}

TEST_P(CpuNF4Linear, GradInputIsDyTimesW) {
  for_each_shape([&](const LinearShape& shape, StoredWeight& weight, const Matrix& w) {
    HostTensor dy = HostTensor::random(dtype, {shape.m, shape.n}, generator);
    HostTensor dx(dtype, {shape.m, shape.k});
    nf4_linear_grad_input(dy.view(), weight.view(), dx.view(), {});
    const Matrix exact = dy.matrix() * w;
    const Matrix size = magnitude(dy.matrix()) * magnitude(w);
    EXPECT_TRUE(is_rounded_from(dx, exact.values, (sum_error(shape.n) * size).values));
  });
}

// All bits of the scale's payload are set: what rounds its bits up to 16 would overflow.
TEST_P(CpuNF4Linear, ScaleOfNaNGivesNaN) {
  constexpr std::int64_t n = 3, k = 128, block_size = 64;
  StoredWeight weight = StoredWeight::random(n, k, block_size, is_nested, generator);
  auto& scales = (is_nested ? weight.nested_absmax : weight.absmax).bytes();
  std::fill_n(scales.begin(), sizeof(float), std::uint8_t{0xff});  // nested: those of all rows
  for (const std::int64_t m : {1, 9}) {
    HostTensor x = HostTensor::random(dtype, {m, k}, generator);
    HostTensor y(dtype, {m, n}, std::vector<double>(static_cast<std::size_t>(m * n)));
    nf4_linear(x.view(), weight.view(), {}, y.view(), {});
    HostTensor dy = HostTensor::random(dtype, {m, n}, generator);
    HostTensor dx(dtype, {m, k}, std::vector<double>(static_cast<std::size_t>(m * k)));
    nf4_linear_grad_input(dy.view(), weight.view(), dx.view(), {});
    for (std::int64_t i = 0; i < m; ++i) {
      for (std::int64_t j = 0; j < n; ++j) {
        EXPECT_EQ(std::isnan(y[i * n + j]), is_nested || j == 0) << i << ", " << j;
      }
      for (std::int64_t c = 0; c < k; ++c) {
        EXPECT_EQ(std::isnan(dx[i * k + c]), is_nested || c < block_size) << i << ", " << c;
      }
    }
  }
}

TEST_P(CpuNF4Linear, ScaleOfNaNStaysInItsRow) {
  if (is_nested) GTEST_SKIP() << "a nested scale is that of many rows";
  constexpr std::int64_t n = 5, k = 192, bad_row = 2;  // a chunk of 128 and half a one
  StoredWeight weight = StoredWeight::random(n, k, 64, false, generator);
  const auto first = static_cast<std::ptrdiff_t>(bad_row * k / 64 * sizeof(float));
  std::fill_n(weight.absmax.bytes().begin() + first, sizeof(float), std::uint8_t{0xff});
  for (const std::int64_t m : {1, 3, 9, 16, 40}) {
    HostTensor x = HostTensor::random(dtype, {m, k}, generator);
    HostTensor y(dtype, {m, n}, std::vector<double>(static_cast<std::size_t>(m * n)));
    nf4_linear(x.view(), weight.view(), {}, y.view(), {});
    for (std::int64_t i = 0; i < m; ++i) {
      for (std::int64_t j = 0; j < n; ++j) {
        EXPECT_EQ(std::isnan(y[i * n + j]), j == bad_row) << m << " tokens: " << i << ", " << j;
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Dtypes, CpuNF4Linear, testing::Combine(float_dtypes, testing::Bool()),
                         [](const auto& instance) {
                           return std::string(name_of(std::get<0>(instance.param))) +
                                  (std::get<1>(instance.param) ? "Nested" : "Plain");
                         });

}  // namespace
}  // namespace qlora
