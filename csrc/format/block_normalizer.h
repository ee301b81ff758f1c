// Bringing the elements of a quantisation block into units of its absolute maximum.
#pragma once

#include <limits>

#include "format/host_device.h"

namespace qlora {

/// x -> x / absmax, by the format's rule `x * (1 / absmax)` with both operations in fp32.
///
/// Where the reciprocal of a subnormal absmax overflows, that rule would turn zeros into NaN: such
/// a block divides instead.
class BlockNormalizer {
 public:
  QLORA_HOST_DEVICE constexpr explicit BlockNormalizer(float absmax)
      : absmax_(absmax),
        reciprocal_(1.0f / absmax),
        is_reciprocal_finite_(reciprocal_ <= std::numeric_limits<float>::max()) {}

  QLORA_HOST_DEVICE constexpr float operator()(float x) const {
    return is_reciprocal_finite_ ? x * reciprocal_ : x / absmax_;
  }

  /// Whether it multiplies: for a loop that keeps the division apart.
  QLORA_HOST_DEVICE constexpr bool is_reciprocal_finite() const { return is_reciprocal_finite_; }

 private:
  float absmax_;
  float reciprocal_;
  bool is_reciprocal_finite_;
};

}  // namespace qlora
