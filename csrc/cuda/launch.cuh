// Launching a kernel on a stream.
#pragma once

#include <cuda_runtime.h>

#include "cuda/runtime.h"

namespace qlora::cuda {

/// How many threads run a kernel, and the dynamic shared memory of a thread block.
struct LaunchShape {
  unsigned thread_blocks;
  int threads;
  int shared_bytes = 0;
};

/// Queues `kernel`, and throws if that fails. Unlike cudaGetLastError after <<<>>>, it is not told
/// of errors that others left.
template <typename... Parameters, typename... Arguments>
void launch(const char* operation, void (*kernel)(Parameters...), const LaunchShape& shape,
            cudaStream_t stream, const Arguments&... arguments) {
  constexpr int shared_bytes_without_asking = 48 * 1024;
  if (shape.shared_bytes > shared_bytes_without_asking) {
    allow_shared_bytes(reinterpret_cast<const void*>(kernel), shape.shared_bytes, operation,
                       stream);
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(shape.thread_blocks);
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.dynamicSmemBytes = static_cast<std::size_t>(shape.shared_bytes);
  config.stream = stream;
  const cudaError_t error =
      cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
  if (error != cudaSuccess) throw_launch_error(error, operation, stream);
}

}  // namespace qlora::cuda
