// The tensor-core kernels for a few tokens: codes go straight from memory to registers, where they
// are decoded into fragments.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/nf4_matmul.h"
#include "cuda/nf4_matmul_plan.h"

namespace qlora::cuda {

/// Whether the kernels take this product, for any m up to nf4_max_few_tokens: 16-bit dtypes, k a
/// multiple of 32, tensors aligned to 16 bytes, a weight of less than 2^36 elements.
bool nf4_matmul_few_tokens_supports(const NF4Matmul& matmul);

/// Queues it on `stream` of the current device.
void launch_nf4_matmul_few_tokens(const NF4Matmul& matmul, const FewTokensPlan& plan,
                                  cudaStream_t stream);

}  // namespace qlora::cuda
