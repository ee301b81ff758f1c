// The Lion update of one element (Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms",
// algorithm 2).
#pragma once

#include "core/optimizer_numbers.h"

namespace qlora {

/// What the numbers of a step come to for every element, computed in fp64 and rounded once.
///
///   g <- g / grad_scale                               a product with the rounded reciprocal
///   p <- p (1 - lr weight_decay)                      decoupled decay first
///   p <- p - lr · sign(beta1 m + (1 - beta1) g)       sign(0) = 0, sign(NaN) = NaN
///   m <- beta2 m + (1 - beta2) g
struct LionRule {
  static constexpr int moment_count = 1;

  float decay, beta1, one_minus_beta1, beta2, one_minus_beta2, lr;
  float grad_factor;

  QLORA_HOST_DEVICE explicit LionRule(const OptimizerNumbers& s, float grad_scale = 1.0f)
      : decay(static_cast<float>(1.0 - s.lr * s.weight_decay)),
        beta1(static_cast<float>(s.beta1)),
        one_minus_beta1(static_cast<float>(1.0 - s.beta1)),
        beta2(static_cast<float>(s.beta2)),
        one_minus_beta2(static_cast<float>(1.0 - s.beta2)),
        lr(static_cast<float>(s.lr)),
        grad_factor((s.maximize ? -1.0f : 1.0f) / grad_scale) {}

  /// Updates `param` and its moment in place.
  QLORA_HOST_DEVICE void operator()(float& param, float grad, float& exp_avg) const {
    grad *= grad_factor;
    param *= decay;
    param -= lr * sign(exp_avg * beta1 + one_minus_beta1 * grad);
    exp_avg = exp_avg * beta2 + one_minus_beta2 * grad;
  }

  /// A NaN stays one, so that it shows in the parameter.
  QLORA_HOST_DEVICE static constexpr float sign(float x) {
    if (x > 0.0f) return 1.0f;
    return x < 0.0f ? -1.0f : x;
  }
};

}  // namespace qlora
