// The numbers of an optimiser's step, which its rule (core/adamw_rule.h, core/lion_rule.h) makes the
// factors of every element's update of.
#pragma once

#include <cstdint>
#include <optional>

#include "format/host_device.h"

namespace qlora {

/// Elements of 8-bit state that share a scale. State begins at a multiple of it in its pages.
inline constexpr std::int64_t state_block_size = 256;

/// `step` counts from 1. Lion has no eps.
struct OptimizerNumbers {
  double lr = 1e-3;
  double beta1 = 0.9;
  double beta2 = 0.999;
  double eps = 1e-8;
  double weight_decay = 1e-2;
  std::int64_t step = 1;
  bool maximize = false;
  /// bfloat16 parameters are rounded at random with this seed (core/stochastic_rounding.h), and to
  /// the nearest without.
  std::optional<std::uint64_t> rounding_seed = std::nullopt;
};

/// base^exponent by repeated squaring: the same bits on every device, which pow does not promise.
QLORA_HOST_DEVICE constexpr double integer_power(double base, std::int64_t exponent) {
  double power = 1.0;
  for (; exponent > 0; exponent /= 2) {
    if (exponent % 2 != 0) power *= base;
    base *= base;
  }
  return power;
}

}  // namespace qlora
