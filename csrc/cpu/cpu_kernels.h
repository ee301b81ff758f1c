// The kernels that every instruction set provides. A kernel whose last two arguments are `begin` and
// `end` does that range of an operation's work on one thread, and cpu_backend.cpp splits the ranges
// over threads; the others split their work themselves. scalar/ is the specification of the others.
#pragma once

#include <cstdint>

#include "core/adamw_rule.h"
#include "core/lion_rule.h"
#include "core/operations.h"
#include "core/stochastic_rounding.h"
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

  // -- linear and LoRA: whole operations, which pack operands first and then split their work over
  // up to `num_threads` threads themselves

  void (*nf4_linear)(const TensorView& x, const NF4Bytes& weight, const TensorView& bias,
                     const TensorView& y, int num_threads);
  void (*nf4_linear_grad_input)(const TensorView& dy, const NF4Bytes& weight, const TensorView& dx,
                                int num_threads);
  void (*lora_forward)(const LoRAForward& arguments, int num_threads);
  void (*lora_backward)(const LoRABackward& arguments, int num_threads);

  // -- DoRA

  /// Columns [begin, end).
  void (*dora_scale)(const DoRAScale& arguments, std::int64_t begin, std::int64_t end);
  void (*dora_scale_backward)(const DoRAScaleBackward& arguments, std::int64_t begin,
                              std::int64_t end);

  // -- element-wise

  /// Elements [begin, end); begin is a multiple of 4.
  void (*dropout)(const TensorView& x, double p, std::int64_t seed, const TensorView& out,
                  std::int64_t begin, std::int64_t end);

  // -- optimisers. `rounding` is null, or of the tensor's first element.

  /// Elements [begin, end).
  void (*adamw_step)(const OptimizerTensor& tensor, const AdamWRule& rule,
                     const RoundingStream* rounding, std::int64_t begin, std::int64_t end);
  void (*lion_step)(const OptimizerTensor& tensor, const LionRule& rule,
                    const RoundingStream* rounding, std::int64_t begin, std::int64_t end);
  /// Blocks of 256 elements [begin, end).
  void (*adamw8bit_step)(const OptimizerTensor& tensor, const AdamWRule& rule,
                         const RoundingStream* rounding, std::int64_t begin, std::int64_t end);
  void (*lion8bit_step)(const OptimizerTensor& tensor, const LionRule& rule,
                        const RoundingStream* rounding, std::int64_t begin, std::int64_t end);
};

// Each set is defined in its folder. A set starts from the one before it and replaces what it does
// better.
const CpuKernels& scalar_kernels();
const CpuKernels& avx2_kernels();
const CpuKernels& avx512_kernels();
const CpuKernels& avx512_bf16_kernels();
const CpuKernels& amx_kernels();

}  // namespace qlora
