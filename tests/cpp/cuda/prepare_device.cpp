// The real device, where there is one.
#include <cuda_runtime_api.h>

#include "cuda/device_memory.h"

namespace qlora {

std::string prepare_device() {
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

}  // namespace qlora
