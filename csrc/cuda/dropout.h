// The launcher of dropout's kernel. It queues work on a stream of the current device and does not
// wait for it; the seed is read on the device. Arguments are validated (core/operations.cpp).
#pragma once

#include <cuda_runtime_api.h>

#include "core/tensor_view.h"

namespace qlora::cuda {

void launch_dropout(const TensorView& x, double p, const TensorView& seed, const TensorView& out,
                    cudaStream_t stream);

}  // namespace qlora::cuda
