// The rules of core/adamw_rule.h and core/lion_rule.h on a register of elements, with the same
// operations in the same order: the results are the same bits.
#pragma once

#include <utility>

#include "core/adamw_rule.h"
#include "core/lion_rule.h"
#include "cpu/simd/inline.h"

namespace qlora::simd {

/// Calls `function` with 0 to count - 1, each a constant.
template <int count, typename Function>
QLORA_INLINE void for_each_moment(Function&& function) {
  [&]<int... i>(std::integer_sequence<int, i...>) QLORA_INLINE_LAMBDA {
    (function(std::integral_constant<int, i>()), ...);
  }(std::make_integer_sequence<int, count>());
}

template <typename Simd, typename Rule>
class VectorRule;

template <typename Simd>
class VectorRule<Simd, AdamWRule> {
 public:
  using Floats = typename Simd::Floats;

  QLORA_INLINE explicit VectorRule(const AdamWRule& rule)
      : decay_(Simd::broadcast(rule.decay)),
        one_minus_beta1_(Simd::broadcast(rule.one_minus_beta1)),
        beta2_(Simd::broadcast(rule.beta2)),
        one_minus_beta2_(Simd::broadcast(rule.one_minus_beta2)),
        step_size_(Simd::broadcast(rule.step_size)),
        bias_correction2_sqrt_(rule.bias_correction2_sqrt),
        eps_(Simd::broadcast(rule.eps)),
        grad_factor_(Simd::broadcast(rule.grad_factor)) {}

  QLORA_INLINE void operator()(Floats& param, Floats grad, Floats (&moments)[2]) const {
    auto& [exp_avg, exp_avg_sq] = moments;
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

template <typename Simd>
class VectorRule<Simd, LionRule> {
 public:
  using Floats = typename Simd::Floats;

  QLORA_INLINE explicit VectorRule(const LionRule& rule)
      : decay_(Simd::broadcast(rule.decay)),
        beta1_(Simd::broadcast(rule.beta1)),
        one_minus_beta1_(Simd::broadcast(rule.one_minus_beta1)),
        beta2_(Simd::broadcast(rule.beta2)),
        one_minus_beta2_(Simd::broadcast(rule.one_minus_beta2)),
        lr_(Simd::broadcast(rule.lr)),
        grad_factor_(Simd::broadcast(rule.grad_factor)) {}

  QLORA_INLINE void operator()(Floats& param, Floats grad, Floats (&moments)[1]) const {
    Floats& exp_avg = moments[0];
    grad = grad * grad_factor_;
    param = param * decay_;
    param = param - lr_ * Simd::sign(exp_avg * beta1_ + one_minus_beta1_ * grad);
    exp_avg = exp_avg * beta2_ + one_minus_beta2_ * grad;
  }

 private:
  Floats decay_, beta1_, one_minus_beta1_, beta2_, one_minus_beta2_, lr_, grad_factor_;
};

}  // namespace qlora::simd
