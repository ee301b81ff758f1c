// The launcher of the optimisers' kernels. It queues work on a stream of the current device and
// does not wait for it: one launch for up to 448 parameters, and a short one before it where the
// step's numbers are in the device's memory.
//
// Preconditions: the arguments are validated (core/operations.cpp).
#pragma once

#include <memory>
#include <span>

#include <cuda_runtime_api.h>

#include "core/operations.h"

namespace qlora::cuda {

/// A step, queued in one call or in several, each for a part of the tensors. What it takes of
/// memory, kernels' code included, the constructor takes: a call cannot run out of it, and so a
/// walk over pages does not end in its middle for the want of it.
class OptimizerLaunch {
 public:
  /// `has_step_counts`: tensors may have one. What the step's tensors point to, and the device that
  /// is current here, stay the same for all calls.
  OptimizerLaunch(OptimizerRule rule, bool is_8bit, const OptimizerStep& step, bool has_step_counts,
                  cudaStream_t stream);
  ~OptimizerLaunch();

  void operator()(std::span<const OptimizerTensor> tensors);

  class Batches;  // of a rule

 private:
  std::unique_ptr<Batches> batches_;
};

}  // namespace qlora::cuda
