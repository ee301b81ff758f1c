#include "support/reference.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace reference {

double sum_error(std::int64_t n) {
  const double nu = static_cast<double>(n) * fp32_unit;
  return nu / (1.0 - nu);
}

double tensor_core_sum_error(std::int64_t n) { return sum_error(2 * n); }

double round_to(const FloatFormat& format, double x) {
  if (x == 0.0 || !std::isfinite(x)) return x;
  const int exponent = std::max(std::ilogb(x), format.min_exponent);
  const int last_bit = exponent - (format.significand_bits - 1);
  const double rounded = std::ldexp(std::nearbyint(std::ldexp(x, -last_bit)), last_bit);
  if (std::fabs(rounded) <= format.max) return rounded;
  return std::copysign(std::numeric_limits<double>::infinity(), x);
}

Matrix transpose(const Matrix& a) {
  Matrix out(a.columns, a.rows);
  for (std::int64_t i = 0; i < a.rows; ++i) {
    for (std::int64_t j = 0; j < a.columns; ++j) out.at(j, i) = a.at(i, j);
  }
  return out;
}

Matrix magnitude(const Matrix& a) {
  Matrix out = a;
  for (double& value : out.values) value = std::fabs(value);
  return out;
}

Matrix operator*(const Matrix& a, const Matrix& b) {
  Matrix out(a.rows, b.columns);
  for (std::int64_t i = 0; i < a.rows; ++i) {
    double* const row = out.values.data() + i * b.columns;
    for (std::int64_t l = 0; l < a.columns; ++l) {
      const double scale = a.at(i, l);
      const double* const b_row = b.values.data() + l * b.columns;
      for (std::int64_t j = 0; j < b.columns; ++j) row[j] += scale * b_row[j];
    }
  }
  return out;
}

Matrix operator*(double s, const Matrix& a) {
  Matrix out = a;
  for (double& value : out.values) value *= s;
  return out;
}

Matrix operator+(const Matrix& a, const Matrix& b) {
  Matrix out = a;
  std::transform(a.values.begin(), a.values.end(), b.values.begin(), out.values.begin(),
                 std::plus<>());
  return out;
}

void AdamWElement::step(double grad, const Numbers& numbers, std::int64_t t) {
  constexpr double u = fp32_unit;
  const auto [lr, beta1, beta2, eps, weight_decay] = numbers;
  const double time = static_cast<double>(t);
  const double step_size = lr / (1.0 - std::pow(beta1, time));
  const double bias_correction2_sqrt = std::sqrt(1.0 - std::pow(beta2, time));

  // m + (1 - beta1)(g - m): the difference, the coefficient and the product round, then the sum.
  const double correction = (1.0 - beta1) * (grad - exp_avg);
  exp_avg += correction;
  exp_avg_error = beta1 * exp_avg_error + u * (3.0 * std::fabs(correction) + std::fabs(exp_avg));

  // beta2 v + (1 - beta2) g²: two coefficients, three products, one sum; no term is negative.
  exp_avg_sq = beta2 * exp_avg_sq + (1.0 - beta2) * grad * grad;
  exp_avg_sq_error = beta2 * exp_avg_sq_error + 5.0 * u * exp_avg_sq;

  const double denominator = std::sqrt(exp_avg_sq) / bias_correction2_sqrt + eps;
  const double update = step_size * exp_avg / denominator;
  param = param * (1.0 - lr * weight_decay) - update;

  // The root halves the relative error of v. Root, two divisions, one sum, one product and three
  // constants round.
  const double root_error = exp_avg_sq > 0.0 ? exp_avg_sq_error / (2.0 * exp_avg_sq) : 0.0;
  const double update_error =
      std::fabs(update) * (root_error + 8.0 * u) + step_size / denominator * exp_avg_error;
  param_error += u * (2.0 * std::fabs(param + update) + std::fabs(param)) + update_error;
}

void LionElement::step(double grad, const Numbers& numbers) {
  constexpr double u = fp32_unit;
  const auto [lr, beta1, beta2, weight_decay] = numbers;
  // a m + (1 - a) g: two coefficients and two products round, then the sum.
  const auto interpolate = [&](double a, double& error) {
    const double of_moment = a * exp_avg, of_grad = (1.0 - a) * grad;
    error = a * exp_avg_error + u * (2.0 * (std::fabs(of_moment) + std::fabs(of_grad)) +
                                     std::fabs(of_moment + of_grad));
    return of_moment + of_grad;
  };
  double direction_error, new_exp_avg_error;
  const double direction = interpolate(beta1, direction_error);
  const double new_exp_avg = interpolate(beta2, new_exp_avg_error);
  exp_avg = new_exp_avg;
  exp_avg_error = new_exp_avg_error;

  is_sign_sure = direction == 0.0 ? direction_error == 0.0 : std::fabs(direction) > direction_error;
  const double update = lr * static_cast<double>((direction > 0.0) - (direction < 0.0));
  param = param * (1.0 - lr * weight_decay) - update;
  // The decay and its product, the learning rate, the difference.
  param_error += u * (2.0 * std::fabs(param + update) + std::fabs(update) + std::fabs(param)) +
                 (is_sign_sure ? 0.0 : 2.0 * lr);
}

}  // namespace reference
