#include "cpu/avx512/kernels.h"

namespace qlora {

const CpuKernels& avx512_kernels() {
  static const CpuKernels kernels = [] {
    CpuKernels set = avx2_kernels();
    set.name = "avx512";
    set.nf4_linear = avx512::nf4_linear;
    set.nf4_linear_grad_input = avx512::nf4_linear_grad_input;
    set.lora_forward = avx512::lora_forward;
    set.lora_backward = avx512::lora_backward;
    return set;
  }();
  return kernels;
}

}  // namespace qlora
