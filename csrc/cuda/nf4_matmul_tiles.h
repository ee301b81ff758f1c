// The tensor-core kernel for tens to hundreds of tokens: a thread block decodes a tile of the weight
// into shared memory once and multiplies it with a tile of tokens.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/device_traits.h"
#include "cuda/nf4_matmul.h"

namespace qlora::cuda {

/// Whether the kernel takes this product: its dtype, shape and addresses. Others need another
/// strategy.
bool nf4_matmul_tiles_supports(const NF4Matmul& matmul, const DeviceTraits& device);

/// Queues it on `stream` of the current device.
void launch_nf4_matmul_tiles(const NF4Matmul& matmul, const DeviceTraits& device,
                             cudaStream_t stream);

}  // namespace qlora::cuda
