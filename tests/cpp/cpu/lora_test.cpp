// lora_forward and lora_backward against fp64. What is rounded to the dtype of x on the way (t, u)
// is rounded in the reference too; where it may fall either way, the doubt is carried into the
// tolerance.
#include <algorithm>
#include <cmath>

#include "core/operations.h"
#include "support/host_tensor.h"

namespace qlora {
namespace {

using reference::Matrix;
using reference::sum_error;

struct LoRAShape {
  std::int64_t m, n, k, r;
};
// Around the edges of the kernels' tiles (16 tokens, ranks or columns; 32 of what is summed over), of
// their blocks of 64 tokens and of their chunks of 512 columns and more.
constexpr LoRAShape shapes[] = {
    {1, 1, 1, 1},      {1, 5, 3, 2},        {1, 64, 33, 16},   {3, 17, 31, 8},
    {7, 1, 65, 4},     {5, 33, 1, 7},       {70, 9, 40, 3},    {2, 130, 257, 64},
    {0, 5, 6, 2},      {4, 0, 6, 2},        {4, 5, 0, 2},      {4, 5, 6, 0},
    {32, 64, 96, 16},  {64, 32, 32, 32},    {15, 31, 33, 17},  {17, 47, 100, 7},
    {33, 65, 15, 33},  {100, 48, 80, 1},    {65, 515, 40, 16}, {16, 40, 515, 15},
    {20, 36, 52, 130}, {100, 1025, 513, 5}, {9, 20, 1100, 70}, {128, 16, 16, 64},
    {17, 33, 17, 260}};
constexpr float scaling = 0.7f;

/// A matrix that was computed in fp32 and rounded: its likeliest value, and how far the true one
/// may be from it.
struct Rounded {
  Matrix value, doubt;
};

Rounded round_matrix(const Matrix& exact, const Matrix& tolerance,
                     const reference::FloatFormat& format) {
  Rounded out = {exact, exact};
  for (std::size_t i = 0; i < exact.values.size(); ++i) {
    const double value = reference::round_to(format, exact.values[i]);
    const double low = reference::round_to(format, exact.values[i] - tolerance.values[i]);
    const double high = reference::round_to(format, exact.values[i] + tolerance.values[i]);
    out.value.values[i] = value;
    out.doubt.values[i] = std::max(value - low, high - value);
  }
  return out;
}

/// The parameters: dtype of x, dtype of the factors.
class CpuLoRA : public testing::TestWithParam<std::tuple<DType, DType>> {
 protected:
  const DType dtype = std::get<0>(GetParam()), factor_dtype = std::get<1>(GetParam());
  Generator generator{14};

  /// A factor as the contract multiplies with it: rounded to the dtype of x.
  Matrix rounded_factor(const HostTensor& factor) const {
    Matrix out = factor.matrix();
    for (double& value : out.values) value = reference::round_to(format_of(dtype), value);
    return out;
  }
};

TEST_P(CpuLoRA, ForwardWritesTAndAddsTheUpdateToY) {
  for (const auto& [m, n, k, r] : shapes) {
    SCOPED_TRACE(message("m=", m, " n=", n, " k=", k, " r=", r));
    HostTensor x = HostTensor::random(dtype, {m, k}, generator);
    HostTensor lora_a = HostTensor::random(factor_dtype, {r, k}, generator);
    HostTensor lora_b = HostTensor::random(factor_dtype, {n, r}, generator);
    HostTensor y = HostTensor::random(dtype, {m, n}, generator), t(dtype, {m, r});
    const Matrix y_before = y.matrix();
    lora_forward({x.view(), lora_a.view(), lora_b.view(), scaling, t.view(), y.view()}, {});

    const Matrix a = transpose(rounded_factor(lora_a)), b = transpose(rounded_factor(lora_b));
    const Matrix t_size = magnitude(x.matrix()) * magnitude(a);
    EXPECT_TRUE(is_rounded_from(t, (x.matrix() * a).values, (sum_error(k) * t_size).values));

    // From the t that was written: r products, their scaling, the addition.
    const Matrix y_exact = y_before + scaling * (t.matrix() * b);
    const Matrix y_size = magnitude(y_before) + scaling * (magnitude(t.matrix()) * magnitude(b));
    EXPECT_TRUE(is_rounded_from(y, y_exact.values, (sum_error(r + 2) * y_size).values));
  }
}

TEST_P(CpuLoRA, BackwardGivesTheThreeGradients) {
  for (const auto& [m, n, k, r] : shapes) {
    SCOPED_TRACE(message("m=", m, " n=", n, " k=", k, " r=", r));
    HostTensor dy = HostTensor::random(dtype, {m, n}, generator);
    HostTensor x = HostTensor::random(dtype, {m, k}, generator);
    HostTensor t = HostTensor::random(dtype, {m, r}, generator);
    HostTensor lora_a = HostTensor::random(factor_dtype, {r, k}, generator);
    HostTensor lora_b = HostTensor::random(factor_dtype, {n, r}, generator);
    HostTensor grad_a(factor_dtype, {r, k}), grad_b(factor_dtype, {n, r});
    HostTensor dx = HostTensor::random(dtype, {m, k}, generator);
    const Matrix dx_before = dx.matrix();
    lora_backward({dy.view(), x.view(), t.view(), lora_a.view(), lora_b.view(), scaling,
                   grad_a.view(), grad_b.view(), dx.view()},
                  {});

    const Matrix a = rounded_factor(lora_a), b = rounded_factor(lora_b);
    const Matrix u_size = scaling * (magnitude(dy.matrix()) * magnitude(b));
    const Rounded u =
        round_matrix(scaling * (dy.matrix() * b), sum_error(n + 1) * u_size, format_of(dtype));

    const Matrix grad_b_exact = scaling * (transpose(dy.matrix()) * t.matrix());
    const Matrix grad_b_size =
        scaling * (magnitude(transpose(dy.matrix())) * magnitude(t.matrix()));
    EXPECT_TRUE(
        is_rounded_from(grad_b, grad_b_exact.values, (sum_error(m + 1) * grad_b_size).values));

    const Matrix x_size = magnitude(x.matrix());
    const Matrix grad_a_size = magnitude(transpose(u.value)) * x_size;
    EXPECT_TRUE(is_rounded_from(
        grad_a, (transpose(u.value) * x.matrix()).values,
        (sum_error(m) * grad_a_size + 1.001 * (transpose(u.doubt) * x_size)).values));

    const Matrix dx_size = magnitude(dx_before) + magnitude(u.value) * magnitude(a);
    EXPECT_TRUE(
        is_rounded_from(dx, (dx_before + u.value * a).values,
                        (sum_error(r + 1) * dx_size + 1.001 * (u.doubt * magnitude(a))).values));
  }
}

TEST_P(CpuLoRA, BackwardWithoutDxGivesTheSameGradients) {
  HostTensor dy = HostTensor::random(dtype, {9, 20}, generator);
  HostTensor x = HostTensor::random(dtype, {9, 33}, generator);
  HostTensor t = HostTensor::random(dtype, {9, 4}, generator);
  HostTensor lora_a = HostTensor::random(factor_dtype, {4, 33}, generator);
  HostTensor lora_b = HostTensor::random(factor_dtype, {20, 4}, generator);
  HostTensor dx = HostTensor::random(dtype, {9, 33}, generator), absent;
  std::vector<HostTensor> gradients;
  for (HostTensor* const maybe_dx : {&dx, &absent}) {
    HostTensor grad_a(factor_dtype, {4, 33}), grad_b(factor_dtype, {20, 4});
    lora_backward({dy.view(), x.view(), t.view(), lora_a.view(), lora_b.view(), scaling,
                   grad_a.view(), grad_b.view(), maybe_dx->view()},
                  {});
    gradients.push_back(grad_a);
    gradients.push_back(grad_b);
  }
  EXPECT_EQ(gradients[0].bytes(), gradients[2].bytes());
  EXPECT_EQ(gradients[1].bytes(), gradients[3].bytes());
}

TEST_P(CpuLoRA, ZeroBLeavesYAsItWas) {
  // A fresh adapter must not change the base by a bit.
  HostTensor x = HostTensor::random(dtype, {5, 33}, generator), t(dtype, {5, 4});
  HostTensor lora_a = HostTensor::random(factor_dtype, {4, 33}, generator);
  HostTensor lora_b(factor_dtype, {20, 4}, std::vector<double>(80, 0.0));
  HostTensor y = HostTensor::random(dtype, {5, 20}, generator);
  const HostTensor before = y;
  lora_forward({x.view(), lora_a.view(), lora_b.view(), scaling, t.view(), y.view()}, {});
  EXPECT_EQ(y.bytes(), before.bytes());
}

INSTANTIATE_TEST_SUITE_P(Dtypes, CpuLoRA, testing::Combine(float_dtypes, float_dtypes),
                         [](const auto& instance) {
                           return std::string(name_of(std::get<0>(instance.param))) + "Factors" +
                                  name_of(std::get<1>(instance.param));
                         });

}  // namespace
}  // namespace qlora
