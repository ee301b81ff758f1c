#include "cpu/amx/kernels.h"

namespace qlora {

const CpuKernels& amx_kernels() {
  static const CpuKernels kernels = [] {
    CpuKernels set = avx512_bf16_kernels();
    set.name = "amx";
    set.nf4_linear = amx::nf4_linear;
    set.nf4_linear_grad_input = amx::nf4_linear_grad_input;
    set.lora_forward = amx::lora_forward;
    set.lora_backward = amx::lora_backward;
    return set;
  }();
  return kernels;
}

}  // namespace qlora
