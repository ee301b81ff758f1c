// The optimisers' rules, with the same bits in fewer instructions where there are some to be saved.
#pragma once

#include <cmath>
#include <limits>

#include "core/adamw_rule.h"
#include "core/lion_rule.h"
#include "cuda/ptx.cuh"
#include "cuda/quad.cuh"

namespace qlora::cuda {

template <typename Rule>
class DeviceRule;

/// core/adamw_rule.h. One of its two divisions is by a number that all elements share.
template <>
class DeviceRule<AdamWRule> {
 public:
  __device__ explicit DeviceRule(const AdamWRule& rule)
      : rule_(rule), reciprocal_(1.0f / rule.bias_correction2_sqrt) {}

  __device__ void operator()(float& param, float grad, float& exp_avg, float& exp_avg_sq) const {
    grad *= rule_.grad_factor;
    param *= rule_.decay;
    exp_avg += rule_.one_minus_beta1 * (grad - exp_avg);
    exp_avg_sq = exp_avg_sq * rule_.beta2 + rule_.one_minus_beta2 * grad * grad;
    const float denominator = divide_by_bias_correction(std::sqrt(exp_avg_sq)) + rule_.eps;
    param -= rule_.step_size * (exp_avg / denominator);
  }

 private:
  /// root / bias_correction2_sqrt, to the bit. The product with the reciprocal is within 1.5 last
  /// places of the quotient, the first correction makes it one of the quotient's two neighbours, from
  /// which the second rounds it correctly (Markstein 1990, given a correctly rounded reciprocal). A
  /// root is 0 or at least 2^-75 and the divisor at least 2^-27, so that nothing on the way is
  /// subnormal or too large; Inf would become NaN.
  __device__ float divide_by_bias_correction(float root) const {
    float quotient = root * reciprocal_;
    float rest = fused_multiply_add(-quotient, rule_.bias_correction2_sqrt, root);
    quotient = fused_multiply_add(rest, reciprocal_, quotient);
    rest = fused_multiply_add(-quotient, rule_.bias_correction2_sqrt, root);
    quotient = fused_multiply_add(rest, reciprocal_, quotient);
    return root == std::numeric_limits<float>::infinity() ? root : quotient;
  }

  AdamWRule rule_;
  float reciprocal_;
};

template <>
class DeviceRule<LionRule> : public LionRule {
 public:
  __device__ explicit DeviceRule(const LionRule& rule) : LionRule(rule) {}
};

/// Steps the elements of quad `q`, of which moment j is moments[j][q].
template <typename Rule, int quads>
__device__ void step_quad(const DeviceRule<Rule>& rule, Quad& param, const Quad& grad,
                          Quad (&moments)[Rule::moment_count][quads], int q) {
#pragma unroll
  for (int i = 0; i < elements_per_quad; ++i) {
    if constexpr (Rule::moment_count == 2) {
      rule(param.values[i], grad.values[i], moments[0][q].values[i], moments[1][q].values[i]);
    } else {
      rule(param.values[i], grad.values[i], moments[0][q].values[i]);
    }
  }
}

}  // namespace qlora::cuda
