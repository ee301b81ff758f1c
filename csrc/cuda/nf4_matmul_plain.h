// The plain kernel for products with an NF4 weight: it takes all of them.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/nf4_matmul.h"

namespace qlora::cuda {

/// Queues it on `stream` of the current device. There may be no terms (the output is then the bias,
/// or zeros), but there is an output.
void launch_nf4_matmul_plain(const NF4Matmul& matmul, cudaStream_t stream);

}  // namespace qlora::cuda
