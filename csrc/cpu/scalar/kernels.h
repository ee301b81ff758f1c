// The scalar kernels, one file for each group: plain C++ for any processor, and the specification
// of every other set.
#pragma once

#include "cpu/cpu_kernels.h"

namespace qlora::scalar {

std::int64_t nf4_quantize(const TensorView& w, const NF4Bytes& out, float* absmax,
                          double* group_sums, std::int64_t begin, std::int64_t end);
void nf4_quantize_scales(const float* absmax, float offset, const NF4Bytes& out, std::int64_t begin,
                         std::int64_t end);
void nf4_dequantize(const NF4Bytes& weight, const TensorView& out, std::int64_t begin,
                    std::int64_t end);

void nf4_linear(const TensorView& x, const NF4Bytes& weight, const TensorView& bias,
                const TensorView& y, std::int64_t begin, std::int64_t end);
void nf4_linear_grad_input(const TensorView& dy, const NF4Bytes& weight, const TensorView& dx,
                           std::int64_t begin, std::int64_t end);

void lora_forward(const LoRAForward& arguments, const float* factor_a, const float* factor_b,
                  std::int64_t begin, std::int64_t end);
void lora_backward_input(const LoRABackward& arguments, const float* factor_a,
                         const float* factor_b, float* u, std::int64_t begin, std::int64_t end);
void lora_backward_a(const LoRABackward& arguments, const float* u, std::int64_t begin,
                     std::int64_t end);
void lora_backward_b(const LoRABackward& arguments, std::int64_t begin, std::int64_t end);
void dropout(const TensorView& x, double p, std::int64_t seed, const TensorView& out,
             std::int64_t begin, std::int64_t end);

void adamw_step(const AdamWTensor& tensor, const AdamWRule& rule, std::int64_t begin,
                std::int64_t end);
void adamw8bit_step(const AdamW8bitTensor& tensor, const AdamWRule& rule, std::int64_t begin,
                    std::int64_t end);

}  // namespace qlora::scalar
