#include "cpu/scalar/kernels.h"

namespace qlora {

const CpuKernels& scalar_kernels() {
  static constexpr CpuKernels kernels = {
      .name = "scalar",
      .nf4_quantize = scalar::nf4_quantize,
      .nf4_quantize_scales = scalar::nf4_quantize_scales,
      .nf4_dequantize = scalar::nf4_dequantize,
      .nf4_linear = scalar::nf4_linear,
      .nf4_linear_grad_input = scalar::nf4_linear_grad_input,
      .lora_forward = scalar::lora_forward,
      .lora_backward = scalar::lora_backward,
      .dora_scale = scalar::dora_scale,
      .dora_scale_backward = scalar::dora_scale_backward,
      .dropout = scalar::dropout,
      .adamw_step = scalar::adamw_step,
      .lion_step = scalar::lion_step,
      .adamw8bit_step = scalar::adamw8bit_step,
      .lion8bit_step = scalar::lion8bit_step,
  };
  return kernels;
}

}  // namespace qlora
