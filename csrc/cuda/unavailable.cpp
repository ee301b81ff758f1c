// Linked instead of the CUDA backend in a build without CUDA.
#include "core/backend.h"

namespace qlora {

namespace {

[[noreturn]] void throw_unavailable() {
  throw Unsupported(
      "this build of qlora_native has no CUDA backend; install a CUDA toolkit (nvcc 12.8 or newer) "
      "and reinstall with --config-settings=cmake.define.QLORA_CUDA=ON");
}

}  // namespace

const Backend& cuda_backend() { throw_unavailable(); }

CudaInfo cuda_info() { return {}; }

std::string cuda_nf4_matmul_strategy(const NF4MatmulShape&, int) { throw_unavailable(); }

}  // namespace qlora
