// The scale of a quantisation block.
#pragma once

#include <cmath>
#include <cstdint>

#include "format/float16.h"

namespace qlora::scalar {

/// The largest magnitude of `count` values, or NaN if there is one among them.
template <typename T>
float absolute_maximum(const T* values, std::int64_t count) {
  float maximum = 0.0f;
  for (std::int64_t i = 0; i < count; ++i) {
    const float magnitude = std::fabs(to_float(values[i]));
    if (magnitude <= maximum) continue;
    if (std::isnan(magnitude)) return magnitude;
    maximum = magnitude;
  }
  return maximum;
}

}  // namespace qlora::scalar
