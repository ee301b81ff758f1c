// Linked instead of the CUDA backend in a build without CUDA.
#include "core/backend.h"

namespace qlora {
namespace {

constexpr char reason[] =
    "this build of qlora_native has no CUDA backend; install a CUDA toolkit (nvcc 12.8 or newer) "
    "and reinstall with --config-settings=cmake.define.QLORA_CUDA=ON";

}  // namespace

const Backend& cuda_backend() { throw Unsupported(reason); }

CudaInfo cuda_info() { return {}; }

CudaDeviceReport cuda_device_report() { return {.usable = {}, .problems = {reason}}; }

std::string cuda_nf4_matmul_strategy(const NF4MatmulShape&, int) { throw Unsupported(reason); }

}  // namespace qlora
