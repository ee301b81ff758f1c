#include "cpu/avx512/kernels.h"

namespace qlora {

const CpuKernels& avx512_kernels() {
  static const CpuKernels kernels = [] {
    CpuKernels set = avx2_kernels();
    set.name = "avx512";
    set.nf4_quantize = avx512::nf4_quantize;
    set.nf4_quantize_scales = avx512::nf4_quantize_scales;
    set.nf4_dequantize = avx512::nf4_dequantize;
    set.nf4_linear = avx512::nf4_linear;
    set.nf4_linear_grad_input = avx512::nf4_linear_grad_input;
    set.lora_forward = avx512::lora_forward;
    set.lora_backward = avx512::lora_backward;
    set.dora_scale = avx512::dora_scale;
    set.dora_scale_backward = avx512::dora_scale_backward;
    set.dropout = avx512::dropout;
    set.adamw_step = avx512::adamw_step;
    set.lion_step = avx512::lion_step;
    set.adamw8bit_step = avx512::adamw8bit_step;
    set.lion8bit_step = avx512::lion8bit_step;
    return set;
  }();
  return kernels;
}

}  // namespace qlora
