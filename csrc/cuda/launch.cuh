// Launching a kernel on a stream.
#pragma once

#include <cuda_runtime.h>

#include "cuda/runtime.h"

namespace qlora::cuda {

/// Queues `kernel`, and throws if that fails. Unlike cudaGetLastError after <<<>>>, it is not told
/// of errors that others left.
template <typename... Parameters, typename... Arguments>
void launch(const char* operation, void (*kernel)(Parameters...), unsigned thread_blocks,
            int threads, cudaStream_t stream, const Arguments&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(thread_blocks);
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = stream;
  check_cuda(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), operation);
}

}  // namespace qlora::cuda
