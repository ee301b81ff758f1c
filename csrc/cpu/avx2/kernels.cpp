#include "cpu/avx2/kernels.h"

namespace qlora {

const CpuKernels& avx2_kernels() {
  static const CpuKernels kernels = [] {
    CpuKernels set = scalar_kernels();
    set.name = "avx2";
    set.lora_forward = avx2::lora_forward;
    set.lora_backward = avx2::lora_backward;
    return set;
  }();
  return kernels;
}

}  // namespace qlora
