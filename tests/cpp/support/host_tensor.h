// Tensors that own their memory, for tests.
#pragma once

#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "core/tensor_view.h"
#include "support/reference.h"

/// One generator for all tests: the same numbers on every machine that shares a standard library.
using Generator = std::mt19937_64;

const reference::FloatFormat& format_of(qlora::DType dtype);

/// A CPU tensor. Its values are read and written in fp64, by conversions that do not use the
/// library's.
///
/// It starts poisoned with 0xff bytes, which is NaN in every floating-point dtype: an output that
/// was not written shows. The memory ends with the last element, so that AddressSanitizer sees a
/// step beyond it.
class HostTensor {
 public:
  HostTensor() = default;  // an absent tensor
  HostTensor(qlora::DType dtype, qlora::Shape shape);
  HostTensor(qlora::DType dtype, qlora::Shape shape, const std::vector<double>& values);

  /// Normally distributed.
  static HostTensor random(qlora::DType dtype, qlora::Shape shape, Generator& generator,
                           double standard_deviation = 1.0);

  qlora::TensorView view();
  std::int64_t numel() const { return shape_.numel(); }
  qlora::DType dtype() const { return dtype_; }
  double operator[](std::int64_t i) const;
  void set(std::int64_t i, double value);  // rounds to the dtype
  std::vector<double> values() const;
  std::vector<std::uint8_t>& bytes() { return bytes_; }
  const std::vector<std::uint8_t>& bytes() const { return bytes_; }

  /// This tensor of two dimensions as a matrix.
  reference::Matrix matrix() const;

 private:
  qlora::DType dtype_ = qlora::DType::float32;
  qlora::Shape shape_;
  bool is_present_ = false;
  std::vector<std::uint8_t> bytes_;
};

/// Every element of `actual` is a number within `tolerance` of `exact`, rounded once to the
/// tensor's dtype. (Much sharper than to add the rounding to the tolerance: a second rounding, or
/// one left out, shows.)
testing::AssertionResult is_rounded_from(const HostTensor& actual, const std::vector<double>& exact,
                                         const std::vector<double>& tolerance);

/// For test names: "float32".
std::string test_name_of(const testing::TestParamInfo<qlora::DType>& info);
inline const auto float_dtypes =
    testing::Values(qlora::DType::float32, qlora::DType::bfloat16, qlora::DType::float16);
