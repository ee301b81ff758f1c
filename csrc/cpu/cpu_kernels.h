// The kernels that every instruction set provides. Each does a range of an operation's work, named
// by its last two arguments, on one thread; cpu_backend.cpp splits the ranges over threads. scalar/
// is the specification of the others.
#pragma once

#include <cstdint>

#include "core/operations.h"
#include "format/nf4_layout.h"

namespace qlora {

struct CpuKernels {
  const char* name;  // "scalar": what QLORA_NATIVE_CPU_ISA calls it

  // -- codec. A "group" is 256 blocks, the unit of nested scales.

  /// Writes codes and fp32 scales (`absmax`, one a block) of groups [begin, end) and each group's
  /// fp64 sum of scales. Returns the first block that holds a NaN or Inf, or -1.
  std::int64_t (*nf4_quantize)(const TensorView& w, const NF4Bytes& out, float* absmax,
                               double* group_sums, std::int64_t begin, std::int64_t end);
  /// Writes nested scale codes and nested_absmax of groups [begin, end).
  void (*nf4_quantize_scales)(const float* absmax, float offset, const NF4Bytes& out,
                              std::int64_t begin, std::int64_t end);
  /// Blocks [begin, end).
  void (*nf4_dequantize)(const NF4Bytes& weight, const TensorView& out, std::int64_t begin,
                         std::int64_t end);

  // -- linear

  /// Columns [begin, end) of y, which are rows of W. `bias` may be absent.
  void (*nf4_linear)(const TensorView& x, const NF4Bytes& weight, const TensorView& bias,
                     const TensorView& y, std::int64_t begin, std::int64_t end);
  /// Columns [begin, end) of dx, which are columns of W.
  void (*nf4_linear_grad_input)(const TensorView& dy, const NF4Bytes& weight, const TensorView& dx,
                                std::int64_t begin, std::int64_t end);

  // -- LoRA. `factor_a`[r,k] and `factor_b`[n,r] are fp32 copies, rounded to the dtype of x
  // already.

  /// Rows [begin, end) of t and y.
  void (*lora_forward)(const LoRAForward& arguments, const float* factor_a, const float* factor_b,
                       std::int64_t begin, std::int64_t end);
  /// Rows [begin, end) of u (fp32 copy of values of the dtype of x) and of dx, if present.
  void (*lora_backward_input)(const LoRABackward& arguments, const float* factor_a,
                              const float* factor_b, float* u, std::int64_t begin,
                              std::int64_t end);
  /// Columns [begin, end) of grad_a, from all rows of u.
  void (*lora_backward_a)(const LoRABackward& arguments, const float* u, std::int64_t begin,
                          std::int64_t end);
  /// Rows [begin, end) of grad_b.
  void (*lora_backward_b)(const LoRABackward& arguments, std::int64_t begin, std::int64_t end);

  /// Elements [begin, end); begin is a multiple of 4.
  void (*dropout)(const TensorView& x, double p, std::int64_t seed, const TensorView& out,
                  std::int64_t begin, std::int64_t end);

  // -- AdamW

  /// Elements [begin, end).
  void (*adamw_step)(const AdamWTensor& tensor, const AdamWRule& rule, std::int64_t begin,
                     std::int64_t end);
  /// Blocks of 256 elements [begin, end).
  void (*adamw8bit_step)(const AdamW8bitTensor& tensor, const AdamWRule& rule, std::int64_t begin,
                         std::int64_t end);
};

// Each set is defined in its folder. A set starts from the one before it and replaces what it does
// better.
const CpuKernels& scalar_kernels();
const CpuKernels& avx2_kernels();
const CpuKernels& avx512_kernels();
const CpuKernels& avx512_bf16_kernels();
const CpuKernels& amx_kernels();

}  // namespace qlora
