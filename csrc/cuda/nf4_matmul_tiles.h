// The tensor-core kernel for tens to hundreds of tokens: a thread block decodes a tile of the weight
// once and multiplies it with a tile of tokens.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/device_traits.h"
#include "cuda/nf4_matmul.h"
#include "cuda/nf4_matmul_tiles_plan.h"

namespace qlora::cuda {

/// Whether the kernel takes this product; others need another strategy. It takes
///
///   bfloat16 and float16, any block_size, nested or plain scales
///   k a multiple of 32; in the gradient n a multiple of 8; any m, and forward any n
///   input and codes aligned to 16 bytes, and any output
bool nf4_matmul_tiles_supports(const NF4Matmul& matmul, const DeviceTraits& device);

/// Plans it and queues it on `stream` of the current device. Throws Unsupported for what it does not take.
void launch_nf4_matmul_tiles(const NF4Matmul& matmul, const DeviceTraits& device,
                             cudaStream_t stream);

/// The same with a plan of the caller's, which tests and measurements want. Precondition: it takes
/// the product.
void launch_nf4_matmul_tiles(const NF4Matmul& matmul, const tiles::Plan& plan, cudaStream_t stream);

}  // namespace qlora::cuda
