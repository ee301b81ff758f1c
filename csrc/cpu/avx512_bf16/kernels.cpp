#include "cpu/avx512_bf16/kernels.h"

namespace qlora {

const CpuKernels& avx512_bf16_kernels() {
  static const CpuKernels kernels = [] {
    CpuKernels set = avx512_kernels();
    set.name = "avx512_bf16";
    set.nf4_linear = avx512_bf16::nf4_linear;
    set.nf4_linear_grad_input = avx512_bf16::nf4_linear_grad_input;
    set.lora_forward = avx512_bf16::lora_forward;
    set.lora_backward = avx512_bf16::lora_backward;
    return set;
  }();
  return kernels;
}

}  // namespace qlora
