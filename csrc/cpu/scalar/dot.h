// Dot products and scaled sums in fp32, in a fixed order that a compiler may vectorise.
#pragma once

#include <cstdint>

namespace qlora::scalar {

/// Σ a_i b_i in 16 interleaved partial sums, then their sum: independent chains for speed, and less
/// rounding than one.
inline float dot(const float* a, const float* b, std::int64_t count) {
  constexpr std::int64_t lanes = 16;
  float partial[lanes] = {};
  std::int64_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    for (std::int64_t lane = 0; lane < lanes; ++lane) partial[lane] += a[i + lane] * b[i + lane];
  }
  for (; i < count; ++i) partial[i % lanes] += a[i] * b[i];
  for (std::int64_t width = lanes / 2; width > 0; width /= 2) {
    for (std::int64_t lane = 0; lane < width; ++lane) partial[lane] += partial[lane + width];
  }
  return partial[0];
}

/// y_i += s x_i.
inline void add_scaled(float s, const float* x, float* y, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) y[i] += s * x[i];
}

}  // namespace qlora::scalar
