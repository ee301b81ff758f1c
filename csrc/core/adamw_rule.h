// The AdamW update of one element (Loshchilov & Hutter 2019, algorithm 2), as torch.optim.AdamW
// orders its operations.
#pragma once

#include <cmath>

#include "core/optimizer_numbers.h"

namespace qlora {

/// What the numbers of a step come to for every element, computed in fp64 and rounded once.
///
///   g <- g / grad_scale                               a product with the rounded reciprocal
///   p <- p (1 - lr weight_decay)                      decoupled decay first
///   m <- m + (1 - beta1) (g - m)
///   v <- beta2 v + (1 - beta2) g²
///   p <- p - lr / (1 - beta1^t) · m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
struct AdamWRule {
  static constexpr int moment_count = 2;

  float decay, one_minus_beta1, beta2, one_minus_beta2, step_size, bias_correction2_sqrt, eps;
  float grad_factor;

  QLORA_HOST_DEVICE explicit AdamWRule(const OptimizerNumbers& s, float grad_scale = 1.0f)
      : decay(static_cast<float>(1.0 - s.lr * s.weight_decay)),
        one_minus_beta1(static_cast<float>(1.0 - s.beta1)),
        beta2(static_cast<float>(s.beta2)),
        one_minus_beta2(static_cast<float>(1.0 - s.beta2)),
        step_size(static_cast<float>(s.lr / (1.0 - integer_power(s.beta1, s.step)))),
        bias_correction2_sqrt(static_cast<float>(std::sqrt(1.0 - integer_power(s.beta2, s.step)))),
        eps(static_cast<float>(s.eps)),
        grad_factor((s.maximize ? -1.0f : 1.0f) / grad_scale) {}

  /// Updates `param` and its moments in place.
  QLORA_HOST_DEVICE void operator()(float& param, float grad, float& exp_avg,
                                    float& exp_avg_sq) const {
    grad *= grad_factor;
    param *= decay;
    exp_avg += one_minus_beta1 * (grad - exp_avg);
    exp_avg_sq = exp_avg_sq * beta2 + one_minus_beta2 * grad * grad;
    const float denominator = std::sqrt(exp_avg_sq) / bias_correction2_sqrt + eps;
    param -= step_size * (exp_avg / denominator);
  }
};

}  // namespace qlora
