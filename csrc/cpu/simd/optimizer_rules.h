// AdamWRule (core/adamw_rule.h) on a register of elements, with the same operations in the same
// order: the results are the same bits.
#pragma once

#include "core/adamw_rule.h"
#include "cpu/simd/inline.h"

namespace qlora::simd {

template <typename Simd>
class AdamWVectorRule {
 public:
  using Floats = typename Simd::Floats;

  QLORA_INLINE explicit AdamWVectorRule(const AdamWRule& rule)
      : decay_(Simd::broadcast(rule.decay)),
        one_minus_beta1_(Simd::broadcast(rule.one_minus_beta1)),
        beta2_(Simd::broadcast(rule.beta2)),
        one_minus_beta2_(Simd::broadcast(rule.one_minus_beta2)),
        step_size_(Simd::broadcast(rule.step_size)),
        bias_correction2_sqrt_(rule.bias_correction2_sqrt),
        eps_(Simd::broadcast(rule.eps)),
        grad_factor_(Simd::broadcast(rule.grad_factor)) {}

  QLORA_INLINE void operator()(Floats& param, Floats grad, Floats& exp_avg,
                               Floats& exp_avg_sq) const {
    grad = grad * grad_factor_;
    param = param * decay_;
    exp_avg = exp_avg + one_minus_beta1_ * (grad - exp_avg);
    exp_avg_sq = exp_avg_sq * beta2_ + one_minus_beta2_ * grad * grad;
    const Floats denominator = Simd::divide(Simd::sqrt(exp_avg_sq), bias_correction2_sqrt_) + eps_;
    param = param - step_size_ * (exp_avg / denominator);
  }

 private:
  Floats decay_, one_minus_beta1_, beta2_, one_minus_beta2_, step_size_;
  typename Simd::Divisor bias_correction2_sqrt_;
  Floats eps_, grad_factor_;
};

}  // namespace qlora::simd
