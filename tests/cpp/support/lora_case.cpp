// What is rounded to the dtype of x on the way (t, u) is rounded in the reference too; where it may
// fall either way, the doubt is carried into the tolerance.
#include "support/lora_case.h"

#include <algorithm>

namespace {

using qlora::DType;
using reference::Matrix;
using reference::sum_error;

/// A factor as the contract multiplies with it: rounded to the dtype of x.
Matrix rounded_factor(const HostTensor& factor, DType dtype) {
  Matrix out = factor.matrix();
  for (double& value : out.values) value = reference::round_to(format_of(dtype), value);
  return out;
}

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

}  // namespace

LoRAForwardCase::LoRAForwardCase(DType dtype, DType factor_dtype, const LoRAShape& shape,
                                 Generator& generator)
    : x(HostTensor::random(dtype, {shape.m, shape.k}, generator)),
      lora_a(HostTensor::random(factor_dtype, {shape.r, shape.k}, generator)),
      lora_b(HostTensor::random(factor_dtype, {shape.n, shape.r}, generator)),
      t(dtype, {shape.m, shape.r}),
      y(HostTensor::random(dtype, {shape.m, shape.n}, generator)),
      y_before(y.matrix()) {}

qlora::LoRAForward LoRAForwardCase::arguments() {
  return {x.view(), lora_a.view(), lora_b.view(), lora_scaling, t.view(), y.view()};
}

void LoRAForwardCase::expect_right() const {
  const Matrix a = transpose(rounded_factor(lora_a, x.dtype()));
  const Matrix b = transpose(rounded_factor(lora_b, x.dtype()));
  const Matrix t_size = magnitude(x.matrix()) * magnitude(a);
  EXPECT_TRUE(is_rounded_from(t, (x.matrix() * a).values, (sum_error(a.rows) * t_size).values))
      << "t";

  // From the t that was written: r products, their scaling, the addition.
  const Matrix y_exact = y_before + lora_scaling * (t.matrix() * b);
  const Matrix y_size = magnitude(y_before) + lora_scaling * (magnitude(t.matrix()) * magnitude(b));
  EXPECT_TRUE(is_rounded_from(y, y_exact.values, (sum_error(b.rows + 2) * y_size).values)) << "y";
}

LoRABackwardCase::LoRABackwardCase(DType dtype, DType factor_dtype, const LoRAShape& shape,
                                   Generator& generator)
    : dy(HostTensor::random(dtype, {shape.m, shape.n}, generator)),
      x(HostTensor::random(dtype, {shape.m, shape.k}, generator)),
      t(HostTensor::random(dtype, {shape.m, shape.r}, generator)),
      lora_a(HostTensor::random(factor_dtype, {shape.r, shape.k}, generator)),
      lora_b(HostTensor::random(factor_dtype, {shape.n, shape.r}, generator)),
      grad_a(factor_dtype, {shape.r, shape.k}),
      grad_b(factor_dtype, {shape.n, shape.r}),
      dx(HostTensor::random(dtype, {shape.m, shape.k}, generator)),
      dx_before(dx.matrix()) {}

qlora::LoRABackward LoRABackwardCase::arguments() {
  return {dy.view(),    x.view(),      t.view(),      lora_a.view(), lora_b.view(),
          lora_scaling, grad_a.view(), grad_b.view(), dx.view()};
}

void LoRABackwardCase::expect_right() const {
  const Matrix a = rounded_factor(lora_a, x.dtype()), b = rounded_factor(lora_b, x.dtype());
  const std::int64_t m = x.matrix().rows, n = b.rows, r = b.columns;
  const Matrix u_size = lora_scaling * (magnitude(dy.matrix()) * magnitude(b));
  const Rounded u = round_matrix(lora_scaling * (dy.matrix() * b), sum_error(n + 1) * u_size,
                                 format_of(x.dtype()));

  const Matrix grad_b_exact = lora_scaling * (transpose(dy.matrix()) * t.matrix());
  const Matrix grad_b_size =
      lora_scaling * (magnitude(transpose(dy.matrix())) * magnitude(t.matrix()));
  EXPECT_TRUE(is_rounded_from(grad_b, grad_b_exact.values, (sum_error(m + 1) * grad_b_size).values))
      << "grad_b";

  const Matrix x_size = magnitude(x.matrix());
  const Matrix grad_a_size = magnitude(transpose(u.value)) * x_size;
  EXPECT_TRUE(
      is_rounded_from(grad_a, (transpose(u.value) * x.matrix()).values,
                      (sum_error(m) * grad_a_size + 1.001 * (transpose(u.doubt) * x_size)).values))
      << "grad_a";

  const Matrix dx_size = magnitude(dx_before) + magnitude(u.value) * magnitude(a);
  EXPECT_TRUE(
      is_rounded_from(dx, (dx_before + u.value * a).values,
                      (sum_error(r + 1) * dx_size + 1.001 * (u.doubt * magnitude(a))).values))
      << "dx";
}
