// The AdamW update of one element (Loshchilov & Hutter 2019, algorithm 2), as torch.optim.AdamW
// orders its operations.
#pragma once

#include <cmath>
#include <cstdint>

#include "format/host_device.h"

namespace qlora {

inline constexpr std::int64_t adamw8bit_block_size = 256;

/// The numbers of one step. `step` counts from 1.
struct AdamWStep {
  double lr = 1e-3;
  double beta1 = 0.9;
  double beta2 = 0.999;
  double eps = 1e-8;
  double weight_decay = 1e-2;
  std::int64_t step = 1;
  bool maximize = false;
};

/// What AdamWStep comes to for every element, computed in fp64 and rounded once.
///
///   p <- p (1 - lr weight_decay)                      decoupled decay first
///   m <- m + (1 - beta1) (g - m)
///   v <- beta2 v + (1 - beta2) g²
///   p <- p - lr / (1 - beta1^t) · m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
struct AdamWRule {
  float decay, one_minus_beta1, beta2, one_minus_beta2, step_size, bias_correction2_sqrt, eps;
  float grad_sign;

  explicit AdamWRule(const AdamWStep& s)
      : decay(static_cast<float>(1.0 - s.lr * s.weight_decay)),
        one_minus_beta1(static_cast<float>(1.0 - s.beta1)),
        beta2(static_cast<float>(s.beta2)),
        one_minus_beta2(static_cast<float>(1.0 - s.beta2)),
        step_size(
            static_cast<float>(s.lr / (1.0 - std::pow(s.beta1, static_cast<double>(s.step))))),
        bias_correction2_sqrt(
            static_cast<float>(std::sqrt(1.0 - std::pow(s.beta2, static_cast<double>(s.step))))),
        eps(static_cast<float>(s.eps)),
        grad_sign(s.maximize ? -1.0f : 1.0f) {}

  /// Updates `param` and its moments in place.
  QLORA_HOST_DEVICE void operator()(float& param, float grad, float& exp_avg,
                                    float& exp_avg_sq) const {
    grad *= grad_sign;
    param *= decay;
    exp_avg += one_minus_beta1 * (grad - exp_avg);
    exp_avg_sq = exp_avg_sq * beta2 + one_minus_beta2 * grad * grad;
    const float denominator = std::sqrt(exp_avg_sq) / bias_correction2_sqrt + eps;
    param -= step_size * (exp_avg / denominator);
  }
};

}  // namespace qlora
