// The arithmetic of the operations once more, in fp64 and without the library's headers: what the
// tests compare with.
//
// Tolerances are bounds, not guesses. With u = 2^-24 an fp32 sum of n products is off by at most
// sum_error(n) times the sum of their magnitudes, in whatever order it is taken (Higham 2002,
// section 3.1). That is proven of sums whose every addition is rounded to nearest: on the CPU, on the
// emulated device, in kernels without tensor cores. Tensor cores are another matter: see
// tensor_core_sum_error.
#pragma once

#include <cstdint>
#include <vector>

namespace reference {

inline constexpr double fp32_unit = 0x1p-24;  // u: half the distance from 1 to the next fp32

/// n u / (1 - n u).
double sum_error(std::int64_t n);

/// sum_error with 2 u in place of u, for sums that a GPU's tensor cores may have taken. They align the
/// addends of a step to the largest and cut them off, which is off by up to a whole last place where
/// rounding is off by half of one. How they do it is not documented (Fasi et al. 2021 measured it), so
/// this is a tolerance with a reason, not a proven bound.
double tensor_core_sum_error(std::int64_t n);

/// A binary floating-point format.
struct FloatFormat {
  int significand_bits;
  int min_exponent;
  double max;
};
inline constexpr FloatFormat float32_format = {24, -126, 0x1.fffffep127};
inline constexpr FloatFormat bfloat16_format = {8, -126, 0x1.fep127};
inline constexpr FloatFormat float16_format = {11, -14, 65504.0};

/// The value of `format` nearest to `x`: ties to even, overflow to Inf.
double round_to(const FloatFormat& format, double x);

/// A dense row-major matrix.
struct Matrix {
  std::int64_t rows = 0, columns = 0;
  std::vector<double> values;

  Matrix() = default;
  Matrix(std::int64_t row_count, std::int64_t column_count)
      : rows(row_count),
        columns(column_count),
        values(static_cast<std::size_t>(row_count * column_count)) {}
  Matrix(std::int64_t row_count, std::int64_t column_count, std::vector<double> elements)
      : rows(row_count), columns(column_count), values(std::move(elements)) {}

  double& at(std::int64_t i, std::int64_t j) {
    return values[static_cast<std::size_t>(i * columns + j)];
  }
  double at(std::int64_t i, std::int64_t j) const {
    return values[static_cast<std::size_t>(i * columns + j)];
  }
};

Matrix transpose(const Matrix& a);
Matrix magnitude(const Matrix& a);
Matrix operator*(const Matrix& a, const Matrix& b);
Matrix operator*(double s, const Matrix& a);
Matrix operator+(const Matrix& a, const Matrix& b);

/// AdamW on one element in fp64 (Loshchilov & Hutter 2019, algorithm 2), beside a bound on how far
/// an fp32 evaluation of the same formula can have drifted from it.
struct AdamWElement {
  double param, exp_avg = 0.0, exp_avg_sq = 0.0;
  double param_error = 0.0, exp_avg_error = 0.0, exp_avg_sq_error = 0.0;

  struct Numbers {
    double lr, beta1, beta2, eps, weight_decay;
  };
  void step(double grad, const Numbers& numbers, std::int64_t t);
};

/// Lion in the same way (Chen et al. 2023, algorithm 2).
struct LionElement {
  double param, exp_avg = 0.0;
  double param_error = 0.0, exp_avg_error = 0.0;
  bool is_sign_sure =
      true;  // else fp32 may have taken the other sign, which param_error allows for

  struct Numbers {
    double lr, beta1, beta2, weight_decay;
  };
  void step(double grad, const Numbers& numbers);
};

}  // namespace reference
