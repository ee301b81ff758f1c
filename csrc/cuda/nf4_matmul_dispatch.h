// Products with an NF4 weight: the plan is made and its kernel queued.
#pragma once

#include <cuda_runtime_api.h>

#include "core/backend.h"
#include "cuda/nf4_matmul_plan.h"

namespace qlora::cuda {

/// Queues nf4_linear or nf4_linear_grad_input on `stream` of the current device.
void run_nf4_matmul(const NF4Matmul& matmul, cudaStream_t stream);

/// The advised strategy, if the tensors are as aligned as fresh ones.
Strategy advise_nf4_matmul(const NF4MatmulShape& shape, const DeviceTraits& device);

}  // namespace qlora::cuda
