// Parameters with their state, for optimizer_step.
#pragma once

#include <span>

#include "core/operations.h"

namespace qlora {

inline OptimizerTensor with_32bit_state(const TensorView& param, const TensorView& grad,
                                        const TensorView& exp_avg,
                                        const TensorView& exp_avg_sq = {},
                                        const TensorView& step_count = {}) {
  return {.param = param,
          .grad = grad,
          .state = {.exp_avg = exp_avg,
                    .exp_avg_absmax = {},
                    .exp_avg_sq = exp_avg_sq,
                    .exp_avg_sq_absmax = {}},
          .step_count = step_count};
}

inline OptimizerTensor with_8bit_state(const TensorView& param, const TensorView& grad,
                                       const TensorView& exp_avg, const TensorView& exp_avg_absmax,
                                       const TensorView& exp_avg_sq = {},
                                       const TensorView& exp_avg_sq_absmax = {},
                                       const TensorView& step_count = {}) {
  return {.param = param,
          .grad = grad,
          .state = {.exp_avg = exp_avg,
                    .exp_avg_absmax = exp_avg_absmax,
                    .exp_avg_sq = exp_avg_sq,
                    .exp_avg_sq_absmax = exp_avg_sq_absmax},
          .step_count = step_count};
}

/// A step of AdamW with the state that the tensors have.
inline void adamw_step(std::span<const OptimizerTensor> tensors, const OptimizerStep& step,
                       const ExecutionContext& context) {
  optimizer_step(OptimizerRule::adamw, tensors, step, context);
}

inline void lion_step(std::span<const OptimizerTensor> tensors, const OptimizerStep& step,
                      const ExecutionContext& context) {
  optimizer_step(OptimizerRule::lion, tensors, step, context);
}

}  // namespace qlora
