// The launchers of the optimisers' kernels. They queue work on a stream of the current device and do
// not wait for it: one launch for up to 448 parameters, and a short one before it where the step's
// numbers are in the device's memory.
//
// Preconditions: the arguments are validated (core/operations.cpp).
#pragma once

#include <span>

#include <cuda_runtime_api.h>

#include "core/operations.h"

namespace qlora::cuda {

void launch_adamw_step(std::span<const OptimizerTensor> tensors, const OptimizerStep& step,
                       cudaStream_t stream);

void launch_adamw8bit_step(std::span<const OptimizerTensor> tensors, const OptimizerStep& step,
                           cudaStream_t stream);

}  // namespace qlora::cuda
