#include "cpu/avx2/kernels.h"

namespace qlora {

const CpuKernels& avx2_kernels() {
  static const CpuKernels kernels = [] {
    CpuKernels set = scalar_kernels();
    set.name = "avx2";
    set.nf4_quantize = avx2::nf4_quantize;
    set.nf4_quantize_scales = avx2::nf4_quantize_scales;
    set.nf4_dequantize = avx2::nf4_dequantize;
    set.nf4_linear = avx2::nf4_linear;
    set.nf4_linear_grad_input = avx2::nf4_linear_grad_input;
    set.lora_forward = avx2::lora_forward;
    set.lora_backward = avx2::lora_backward;
    set.dora_scale = avx2::dora_scale;
    set.dora_scale_backward = avx2::dora_scale_backward;
    set.dropout = avx2::dropout;
    set.adamw_step = avx2::adamw_step;
    set.lion_step = avx2::lion_step;
    set.adamw8bit_step = avx2::adamw8bit_step;
    set.lion8bit_step = avx2::lion8bit_step;
    return set;
  }();
  return kernels;
}

}  // namespace qlora
