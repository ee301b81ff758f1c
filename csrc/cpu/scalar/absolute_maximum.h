// The scale of a quantisation block.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

#include "format/float16.h"

namespace qlora::scalar {

/// The largest magnitude of `count` values, or NaN if there is one among them.
///
/// Bit patterns of magnitudes are ordered as the numbers are, with NaN above Inf: an integer
/// maximum needs no branch, and compilers vectorise it.
template <typename T>
float absolute_maximum(const T* values, std::int64_t count) {
  std::int32_t maximum = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    maximum = std::max(maximum, std::bit_cast<std::int32_t>(to_float(values[i])) & 0x7fffffff);
  }
  return std::bit_cast<float>(maximum);
}

}  // namespace qlora::scalar
