// START HERE: every operation of the library, its formula, shapes, dtypes and errors.
//
// Names: m tokens, n out_features, k in_features, r LoRA rank; x[m,k], w[n,k], y[m,n], lora_a[r,k],
// lora_b[n,r]. "float dtype" means float32, bfloat16 or float16. All tensors are contiguous and on
// one device. Sizes are int64; a size of 0 is allowed and does nothing.
//
// One numerical contract: y = x · dequantize(W, dtype of x)ᵀ, products and sums in fp32, one
// rounding at the end. Sums in fp32 are taken in any order; a GPU's tensor cores, whose arithmetic is
// not documented, also align the addends of a step and cut off what does not fit, where fp32 rounds.
//
// Errors, all thrown before an output is touched (but for what a comment says otherwise):
//   InvalidArgument  a shape, dtype, device or number is wrong; the message names the operation and
//   the argument
//   Unsupported      right, but not in this build or on this device
//   OutOfMemory      of the device. Nothing has been queued and nothing stays allocated: a caller who
//   frees memory may make the same call again, also of an operation that adds to its output
//   CudaError
#pragma once

#include <cstdint>
#include <functional>
#include <span>

#include "core/optimizer_numbers.h"
#include "core/tensor_view.h"

namespace qlora {

class PagedState;  // core/paged_state.h

/// Where and how wide an operation runs. CPU operations use up to `num_threads` threads and return
/// when they are done; CUDA operations are queued on `stream` (a cudaStream_t).
struct ExecutionContext {
  int num_threads = 1;
  void* stream = nullptr;
};

/// An NF4 weight [n, k]: uint8 tensors of any shape with the right number of bytes (see
/// format/nf4_layout.h).
struct NF4Weight {
  TensorView codes;          // ceil(n * k / 2) bytes
  TensorView absmax;         // nested: 1 byte a block; plain: 4 bytes a block (fp32)
  TensorView nested_absmax;  // nested: 4 bytes (fp32) for 256 blocks; plain: absent
  TensorView nested_offset;  // nested: 4 bytes (fp32); plain: absent
  std::int64_t n = 0;
  std::int64_t k = 0;
  std::int64_t block_size = 64;  // a power of two from 32 to 4096

  bool is_nested() const { return nested_absmax.is_present; }
};

// ---- codec

/// Quantises w[n,k] (float dtype) into `out`, whose tensors hold the right sizes already.
///
///   absmax_b = max |w_e| over block b
///   code_e   = the NF4 level nearest to w_e * (1 / absmax_b); a tie goes down, a block of zeros
///              gets code 7
///   nested:    offset = mean(absmax), summed in fp64 by runs of 256 in index order, then over the
///              runs, rounded once; (absmax - offset) in blocks of 256, to the nearest entry of the
///              signed dynamic map
///
/// The bits are the same on every device and instruction set. A NaN or Inf is an InvalidArgument
/// that names the first such block; `out` then holds unspecified bytes. On CUDA this operation
/// waits for the stream to learn of it.
void nf4_quantize(const TensorView& w, const NF4Weight& out, const ExecutionContext& context);

/// out_e = level[code_e] * absmax_b in fp32, rounded once to the float dtype of `out` (n * k
/// elements).
void nf4_dequantize(const NF4Weight& weight, const TensorView& out,
                    const ExecutionContext& context);

/// absmax[b] in fp32 for every block, nested or not: `out` is float32 with one element a block.
void nf4_dequantize_absmax(const NF4Weight& weight, const TensorView& out,
                           const ExecutionContext& context);

// ---- linear

/// y[m,n] = x[m,k] · Wᵀ + bias[n]. x, y and bias share one float dtype; `bias` may be absent.
void nf4_linear(const TensorView& x, const NF4Weight& weight, const TensorView& bias,
                const TensorView& y, const ExecutionContext& context);

/// dx[m,k] = dy[m,n] · W, the gradient of nf4_linear with respect to x. dx and dy share one float
/// dtype.
void nf4_linear_grad_input(const TensorView& dy, const NF4Weight& weight, const TensorView& dx,
                           const ExecutionContext& context);

// ---- LoRA

/// Adds a low-rank update to y (Hu et al. 2021, section 4.1):
///
///   t[m,r] = x[m,k] · Aᵀ,  rounded to the dtype of x        (kept for backward)
///   y[m,n] += scaling * t · Bᵀ
///
/// x, t and y share one float dtype, lora_a[r,k] and lora_b[n,r] another: the factors are rounded
/// to the dtype of x first.
struct LoRAForward {
  TensorView x, lora_a, lora_b;
  float scaling = 1.0f;
  TensorView t, y;  // written; added to
};
void lora_forward(const LoRAForward& arguments, const ExecutionContext& context);

/// The gradients of lora_forward:
///
///   u[m,r] = scaling * dy[m,n] · B,  rounded to the dtype of x
///   grad_b[n,r] = scaling * dyᵀ · t;   grad_a[r,k] = uᵀ · x;   dx[m,k] += u · A
///
/// grad_a and grad_b have the dtype of lora_a and lora_b and are rounded once, from fp32 sums. `dx`
/// may be absent.
struct LoRABackward {
  TensorView dy, x, t, lora_a, lora_b;
  float scaling = 1.0f;
  TensorView grad_a, grad_b;  // written
  TensorView dx;              // added to
};
void lora_backward(const LoRABackward& arguments, const ExecutionContext& context);

/// A pair of factors, lora_a[r,k] and lora_b[n,r], of one float dtype; and the gradients in them, of
/// the same dtype and shapes.
struct LoRAAdapter {
  TensorView lora_a, lora_b;
  TensorView grad_a{}, grad_b{};  // lora_backward_grouped: written
};

/// The update of rows [begin, end) by adapter number `adapter`, with dropout of `p` if `seed` (int64,
/// one element) is there. Its mask counts the elements from row `begin`.
struct LoRAGroup {
  std::int64_t begin = 0, end = 0;
  std::int64_t adapter = 0;
  float scaling = 1.0f;
  double p = 0.0;
  TensorView seed{};
};

/// lora_forward of rows of x and y, for each group in turn:
///
///   t_g = dropout(x[begin:end]) · Aᵀ,  rounded to the dtype of x
///   y[begin:end] += scaling * t_g · Bᵀ
///
/// x, t and y share one float dtype; ranks and the dtype of the factors may differ from adapter to
/// adapter. `t` holds t_g[end - begin, r] of every group, one after another. Groups may overlap, and
/// then add to y in their order; an adapter may have any number of groups.
///
/// The bits are those of lora_forward for each group, whatever the number of threads. On a CPU groups
/// run side by side where there are enough of them; the CUDA backend has no such operation yet.
struct LoRAForwardGrouped {
  TensorView x;
  std::span<const LoRAAdapter> adapters;
  std::span<const LoRAGroup> groups;
  TensorView t, y;  // written; added to
};
void lora_forward_grouped(const LoRAForwardGrouped& arguments, const ExecutionContext& context);

/// The gradients of lora_forward_grouped: those of lora_backward for each group, its share of dx by way
/// of its mask. An adapter's gradients are summed over its groups in fp32, in their order, and rounded
/// once; without a row they are zeros. `dx` may be absent.
struct LoRABackwardGrouped {
  TensorView dy, x, t;
  std::span<const LoRAAdapter> adapters;
  std::span<const LoRAGroup> groups;
  TensorView dx;  // added to
};
void lora_backward_grouped(const LoRABackwardGrouped& arguments, const ExecutionContext& context);

/// What makes DoRA of LoRA (Liu et al. 2024, section 4): the rows that nf4_linear and lora_forward
/// have made, with column j scaled by gain[j] = magnitude[j] / norm[j]:
///
///   y[m,n] = gain[n] * rows[m,n] + addend[m,n] + bias[n],  added in this order in fp32, rounded once
///
/// rows, addend, bias and y share one float dtype; gain is float32. `addend` and `bias` may be
/// absent; y may be rows or addend.
struct DoRAScale {
  TensorView rows, gain, addend, bias;
  TensorView y;  // written
};
void dora_scale(const DoRAScale& arguments, const ExecutionContext& context);

/// The gradients of dora_scale in rows and gain:
///
///   scaled[m,n] = gain[n] * dy[m,n],  rounded to the dtype of dy
///   sums[n] = Σ_m dy[m,n] * rows[m,n],  fp32, in the order of the rows
///
/// dy, rows and scaled share one float dtype; gain and sums are float32. rows and sums are absent
/// together; scaled may be dy. The bits of both operations are the same on every instruction set and
/// for every number of threads. The CUDA backend does not have them.
struct DoRAScaleBackward {
  TensorView dy, rows, gain;
  TensorView scaled, sums;  // written
};
void dora_scale_backward(const DoRAScaleBackward& arguments, const ExecutionContext& context);

/// out_e = x_e / (1 - p) with probability 1 - p, else 0, for 0 <= p < 1. `out` may be x.
///
/// The mask is a function of `seed` (int64, one element) and e alone (core/philox.h): applied to a
/// gradient with the same seed this is its own backward, so no mask is stored.
void dropout(const TensorView& x, double p, const TensorView& seed, const TensorView& out,
             const ExecutionContext& context);

// ---- optimisers

/// How a parameter is updated: core/adamw_rule.h and core/lion_rule.h have the formulas.
enum class OptimizerRule : std::uint8_t { adamw, lion };

/// What messages call a step.
constexpr const char* optimizer_step_name(OptimizerRule rule, bool is_8bit) {
  if (rule == OptimizerRule::adamw) return is_8bit ? "adamw8bit_step" : "adamw_step";
  return is_8bit ? "lion8bit_step" : "lion_step";
}

/// The numbers of one step, and those that may be in the memory of the parameters' device instead:
/// each a float32 of one element, or absent. They are read when the step runs, without a
/// synchronisation, and so their range is not checked.
struct OptimizerStep : OptimizerNumbers {
  /// Takes the place of `lr`.
  TensorView lr_tensor{};
  /// What the gradients were multiplied by, which is undone: a scale of the loss, or a norm that is
  /// being clipped over its limit.
  TensorView grad_scale{};
  /// Where it is not zero, the call does nothing.
  TensorView found_inf{};
};

/// Where the state of a parameter is. Of 32 bits: float32 moments of the parameter's size. Of 8 bits:
/// uint8 codes of a dynamic map (first moment signed, second unsigned), one an element, and a float32
/// absmax for each block of 256 (the last may be short). Lion has no second moment.
struct OptimizerState {
  TensorView exp_avg, exp_avg_absmax, exp_avg_sq, exp_avg_sq_absmax;

  bool is_8bit() const { return exp_avg_absmax.is_present; }
};

/// One parameter, or a piece of it, and its state. param and grad: a float dtype each, of one size.
///
/// `step_count` is absent, or a float32 of one element: the steps that the parameter has taken. It
/// then takes the place of `step`, and the call adds one to it if `counts_step`.
///
/// `number` and `first_element`, a multiple of 256, say which parameter of an optimiser it is, and
/// which part of it: stochastic rounding asks for both.
struct OptimizerTensor {
  TensorView param, grad;
  OptimizerState state;
  TensorView step_count{};
  bool counts_step = true;
  std::int64_t number = 0;
  std::int64_t first_element = 0;
};

/// One step on a list of parameters, in one call. No two of them share memory; all have state of
/// one kind.
///
/// With 8-bit state (Dettmers et al. 2022) a block is decoded, stepped in fp32, and encoded again.
/// The parameter sees the moments before they are encoded. A second moment that is not zero is never
/// encoded as zero: eps alone in a denominator would make a step of thousands of times lr.
void optimizer_step(OptimizerRule rule, std::span<const OptimizerTensor> tensors,
                    const OptimizerStep& step, const ExecutionContext& context);

/// A parameter whose state is in pages, from `first_element` of them on: a multiple of 256.
struct PagedTensor {
  TensorView param, grad, step_count;
  std::int64_t first_element = 0;
  std::int64_t number = 0;
};

/// optimizer_step on state in pages, of those pages alone that the tensors have a part in. The bits
/// are optimizer_step's.
void paged_optimizer_step(PagedState& state, std::span<const PagedTensor> tensors,
                          const OptimizerStep& step, const ExecutionContext& context);

/// The same in two parts, so that of several steps all are prepared before the first is taken: takes
/// the memory that the step needs, and returns what queues it, once. `state` and `tensors` must live
/// until then. Throws all that paged_optimizer_step would throw of its arguments or for want of
/// memory.
std::function<void()> prepare_paged_optimizer_step(PagedState& state,
                                                   std::span<const PagedTensor> tensors,
                                                   const OptimizerStep& step,
                                                   const ExecutionContext& context);

/// Throws what paged_optimizer_step would throw of its arguments.
void validate_paged_optimizer_step(const PagedState& state, std::span<const PagedTensor> tensors,
                                   const OptimizerStep& step);

}  // namespace qlora
