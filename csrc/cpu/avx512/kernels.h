// The kernels of AVX-512 F, BW, DQ and VL, one file for each group; the formulas are in
// cpu/scalar/.
#pragma once

#include "cpu/cpu_kernels.h"

namespace qlora::avx512 {

std::int64_t nf4_quantize(const TensorView& w, const NF4Bytes& out, float* absmax,
                          double* group_sums, std::int64_t begin, std::int64_t end);
void nf4_quantize_scales(const float* absmax, float offset, const NF4Bytes& out, std::int64_t begin,
                         std::int64_t end);
void nf4_dequantize(const NF4Bytes& weight, const TensorView& out, std::int64_t begin,
                    std::int64_t end);

void nf4_linear(const TensorView& x, const NF4Bytes& weight, const TensorView& bias,
                const TensorView& y, int num_threads);
void nf4_linear_grad_input(const TensorView& dy, const NF4Bytes& weight, const TensorView& dx,
                           int num_threads);

void lora_forward(const LoRAForward& arguments, int num_threads);
void lora_backward(const LoRABackward& arguments, int num_threads);

void dora_scale(const DoRAScale& arguments, std::int64_t begin, std::int64_t end);
void dora_scale_backward(const DoRAScaleBackward& arguments, std::int64_t begin, std::int64_t end);

void dropout(const TensorView& x, double p, std::int64_t seed, const TensorView& out,
             std::int64_t begin, std::int64_t end);

void adamw_step(const OptimizerTensor& tensor, const AdamWRule& rule,
                const RoundingStream* rounding, std::int64_t begin, std::int64_t end);
void lion_step(const OptimizerTensor& tensor, const LionRule& rule, const RoundingStream* rounding,
               std::int64_t begin, std::int64_t end);
void adamw8bit_step(const OptimizerTensor& tensor, const AdamWRule& rule,
                    const RoundingStream* rounding, std::int64_t begin, std::int64_t end);
void lion8bit_step(const OptimizerTensor& tensor, const LionRule& rule,
                   const RoundingStream* rounding, std::int64_t begin, std::int64_t end);

}  // namespace qlora::avx512
