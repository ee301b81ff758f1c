#include <algorithm>

#include "cpu/scalar/kernels.h"

namespace qlora::scalar {

void dora_scale(const DoRAScale& arguments, std::int64_t begin, std::int64_t end) {
  const auto& [rows, gain, addend, bias, y] = arguments;
  const std::int64_t m = rows.shape[0], n = rows.shape[1];
  with_float_type(rows.dtype, [&]<typename T>(T) {
    for (std::int64_t i = 0; i < m; ++i) {
      for (std::int64_t j = begin; j < end; ++j) {
        const std::int64_t e = i * n + j;
        float value = gain.as<const float>()[j] * to_float(rows.as<const T>()[e]);
        if (addend.is_present) value += to_float(addend.as<const T>()[e]);
        if (bias.is_present) value += to_float(bias.as<const T>()[j]);
        y.as<T>()[e] = from_float<T>(value);
      }
    }
  });
}

void dora_scale_backward(const DoRAScaleBackward& arguments, std::int64_t begin, std::int64_t end) {
  const auto& [dy, rows, gain, scaled, sums] = arguments;
  const std::int64_t m = dy.shape[0], n = dy.shape[1];
  if (sums.is_present) std::fill(sums.as<float>() + begin, sums.as<float>() + end, 0.0f);
  with_float_type(dy.dtype, [&]<typename T>(T) {
    for (std::int64_t i = 0; i < m; ++i) {
      for (std::int64_t j = begin; j < end; ++j) {
        const std::int64_t e = i * n + j;
        const float value = to_float(dy.as<const T>()[e]);
        if (sums.is_present) sums.as<float>()[j] += value * to_float(rows.as<const T>()[e]);
        scaled.as<T>()[e] = from_float<T>(gain.as<const float>()[j] * value);
      }
    }
  });
}

}  // namespace qlora::scalar
