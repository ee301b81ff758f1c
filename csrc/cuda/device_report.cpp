#include "core/backend.h"
#include "cuda/architectures.h"
#include "cuda/runtime.h"

namespace qlora {
namespace {

std::string name_of(int device) {
  cudaDeviceProp properties;
  cuda::check_cuda(cudaGetDeviceProperties(&properties, device), "CUDA");
  return properties.name;
}

}  // namespace

CudaDeviceReport cuda_device_report() {
  CudaDeviceReport report;
  // What goes wrong is what the report is for.
  const auto note_problem = [&](auto&& part) {
    try {
      part();
    } catch (const std::exception& error) {
      report.problems.emplace_back(error.what());
    }
  };
  int count = 0;
  note_problem([&] { cuda::check_cuda(cudaGetDeviceCount(&count), "CUDA"); });
  for (int device = 0; device < count; ++device) {
    note_problem([&] {
      const std::string name = name_of(device);
      const int capability = cuda::device_traits(device, name.c_str()).compute_capability;
      const std::string described =
          message(Device{DeviceType::cuda, device}, " ", name, ", compute capability ",
                  capability / 10, ".", capability % 10);
      if (!cuda::has_code_for(cuda_info().architectures, capability)) {
        throw Unsupported(message(described, ": this build has code for ",
                                  cuda_info().architectures,
                                  " only; rebuild with QLORA_CUDA_ARCHS set to your device's"));
      }
      report.usable.push_back(described);
    });
  }
  return report;
}

}  // namespace qlora
