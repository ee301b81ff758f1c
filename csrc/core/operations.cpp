// Validate, then ask the backend. The rules are in operations.h.
#include "core/operations.h"

#include <cmath>
#include <string>

#include "core/backend.h"
#include "core/stochastic_rounding.h"
#include "core/validate.h"

namespace qlora {

void nf4_quantize(const TensorView& w, const NF4Weight& out, const ExecutionContext& context) {
  const Validator validate("nf4_quantize", w.device);
  validate.float_dtype(w, "w");
  validate.weight(out);
  validate.numel(w, "w", out.n * out.k);
  backend_for(w.device).nf4_quantize(w, out, context);
}

void nf4_dequantize(const NF4Weight& weight, const TensorView& out,
                    const ExecutionContext& context) {
  const Validator validate("nf4_dequantize", weight.codes.device);
  validate.weight(weight);
  validate.float_dtype(out, "out");
  validate.numel(out, "out", weight.n * weight.k);
  backend_for(out.device).nf4_dequantize(weight, out, context);
}

void nf4_dequantize_absmax(const NF4Weight& weight, const TensorView& out,
                           const ExecutionContext& context) {
  const Validator validate("nf4_dequantize_absmax", weight.codes.device);
  validate.weight(weight);
  validate.dtype(out, "out", DType::float32);
  validate.numel(out, "out", nf4_block_count(weight.n * weight.k, weight.block_size));
  backend_for(out.device).nf4_dequantize_absmax(weight, out, context);
}

void nf4_linear(const TensorView& x, const NF4Weight& weight, const TensorView& bias,
                const TensorView& y, const ExecutionContext& context) {
  const Validator validate("nf4_linear", weight.codes.device);
  validate.weight(weight);
  validate.float_dtype(x, "x");
  validate.rank(x, "x", 2);
  const std::int64_t m = x.shape[0], k = x.shape[1];
  check(k == weight.k, "nf4_linear: x has k=", k, ", w has k=", weight.k);
  validate.dtype(y, "y", x.dtype);
  validate.shape(y, "y", {m, weight.n});
  if (bias.is_present) {
    validate.dtype(bias, "bias", x.dtype);
    validate.shape(bias, "bias", {weight.n});
  }
  backend_for(x.device).nf4_linear(x, weight, bias, y, context);
}

void nf4_linear_grad_input(const TensorView& dy, const NF4Weight& weight, const TensorView& dx,
                           const ExecutionContext& context) {
  const Validator validate("nf4_linear_grad_input", weight.codes.device);
  validate.weight(weight);
  validate.float_dtype(dy, "dy");
  validate.rank(dy, "dy", 2);
  const std::int64_t m = dy.shape[0], n = dy.shape[1];
  check(n == weight.n, "nf4_linear_grad_input: dy has n=", n, ", w has n=", weight.n);
  validate.dtype(dx, "dx", dy.dtype);
  validate.shape(dx, "dx", {m, weight.k});
  backend_for(dy.device).nf4_linear_grad_input(dy, weight, dx, context);
}

namespace {

struct LoRASizes {
  std::int64_t m, n, k, r;
};

/// The sizes that x[m,k], lora_a[r,k] and lora_b[n,r] agree on.
LoRASizes validate_lora_factors(const Validator& validate, const char* operation,
                                const TensorView& x, const TensorView& lora_a,
                                const TensorView& lora_b) {
  validate.float_dtype(x, "x");
  validate.rank(x, "x", 2);
  validate.float_dtype(lora_a, "lora_a");
  validate.rank(lora_a, "lora_a", 2);
  validate.dtype(lora_b, "lora_b", lora_a.dtype);
  validate.rank(lora_b, "lora_b", 2);
  const LoRASizes sizes{x.shape[0], lora_b.shape[0], x.shape[1], lora_a.shape[0]};
  check(lora_a.shape[1] == sizes.k, operation, ": x has k=", sizes.k,
        ", lora_a has k=", lora_a.shape[1]);
  check(lora_b.shape[1] == sizes.r, operation, ": lora_a has r=", sizes.r,
        ", lora_b has r=", lora_b.shape[1]);
  return sizes;
}

}  // namespace

void lora_forward(const LoRAForward& arguments, const ExecutionContext& context) {
  const auto& [x, lora_a, lora_b, scaling, t, y] = arguments;
  const Validator validate("lora_forward", lora_a.device);
  const auto [m, n, k, r] = validate_lora_factors(validate, "lora_forward", x, lora_a, lora_b);
  validate.dtype(t, "t", x.dtype);
  validate.shape(t, "t", {m, r});
  validate.dtype(y, "y", x.dtype);
  validate.shape(y, "y", {m, n});
  backend_for(x.device).lora_forward(arguments, context);
}

void lora_backward(const LoRABackward& arguments, const ExecutionContext& context) {
  const auto& [dy, x, t, lora_a, lora_b, scaling, grad_a, grad_b, dx] = arguments;
  const Validator validate("lora_backward", lora_a.device);
  const auto [m, n, k, r] = validate_lora_factors(validate, "lora_backward", x, lora_a, lora_b);
  validate.dtype(dy, "dy", x.dtype);
  validate.shape(dy, "dy", {m, n});
  validate.dtype(t, "t", x.dtype);
  validate.shape(t, "t", {m, r});
  validate.dtype(grad_a, "grad_a", lora_a.dtype);
  validate.shape(grad_a, "grad_a", lora_a.shape);
  validate.dtype(grad_b, "grad_b", lora_b.dtype);
  validate.shape(grad_b, "grad_b", lora_b.shape);
  if (dx.is_present) {
    validate.dtype(dx, "dx", x.dtype);
    validate.shape(dx, "dx", x.shape);
  }
  backend_for(x.device).lora_backward(arguments, context);
}

namespace {

/// Adapters and groups of x[m,k] and y[m,n], and the elements of t that they come to.
void validate_lora_groups(const Validator& validate, const char* operation, const TensorView& x,
                          std::int64_t n, std::span<const LoRAAdapter> adapters,
                          std::span<const LoRAGroup> groups, const TensorView& t) {
  const std::int64_t m = x.shape[0], k = x.shape[1];
  for (std::size_t i = 0; i < adapters.size(); ++i) {
    const auto& [lora_a, lora_b, grad_a, grad_b] = adapters[i];
    const std::string a = message("lora_a[", i, "]"), b = message("lora_b[", i, "]");
    validate.float_dtype(lora_a, a.c_str());
    validate.rank(lora_a, a.c_str(), 2);
    validate.dtype(lora_b, b.c_str(), lora_a.dtype);
    const std::int64_t r = lora_a.shape[0];
    validate.shape(lora_a, a.c_str(), {r, k});
    validate.shape(lora_b, b.c_str(), {n, r});
  }
  std::int64_t t_count = 0;
  for (std::size_t i = 0; i < groups.size(); ++i) {
    const auto& [begin, end, adapter, scaling, p, seed] = groups[i];
    check(0 <= begin && begin <= end && end <= m, operation, ": group ", i, " has rows ", begin,
          " to ", end, ", want 0 <= begin <= end <= ", m, ", the rows of x");
    const auto adapter_count = static_cast<std::int64_t>(adapters.size());
    check(0 <= adapter && adapter < adapter_count, operation, ": group ", i, " has adapter ",
          adapter, ", want one of ", adapter_count);
    check(p >= 0.0 && p < 1.0, operation, ": p of group ", i, " is ", p, ", want 0 <= p < 1");
    check(p == 0.0 || seed.is_present, operation, ": group ", i, " has p ", p, ", but no seed");
    if (seed.is_present) {
      const std::string name = message("seed of group ", i);
      validate.dtype(seed, name.c_str(), DType::int64);
      validate.numel(seed, name.c_str(), 1);
    }
    t_count += (end - begin) * adapters[static_cast<std::size_t>(adapter)].lora_a.shape[0];
  }
  validate.dtype(t, "t", x.dtype);
  validate.numel(t, "t", t_count);
}

}  // namespace

void lora_forward_grouped(const LoRAForwardGrouped& arguments, const ExecutionContext& context) {
  const auto& [x, adapters, groups, t, y] = arguments;
  const Validator validate("lora_forward_grouped", x.device);
  validate.float_dtype(x, "x");
  validate.rank(x, "x", 2);
  validate.dtype(y, "y", x.dtype);
  validate.rank(y, "y", 2);
  validate.shape(y, "y", {x.shape[0], y.shape[1]});
  validate_lora_groups(validate, "lora_forward_grouped", x, y.shape[1], adapters, groups, t);
  backend_for(x.device).lora_forward_grouped(arguments, context);
}

void lora_backward_grouped(const LoRABackwardGrouped& arguments, const ExecutionContext& context) {
  const auto& [dy, x, t, adapters, groups, dx] = arguments;
  const Validator validate("lora_backward_grouped", x.device);
  validate.float_dtype(x, "x");
  validate.rank(x, "x", 2);
  validate.dtype(dy, "dy", x.dtype);
  validate.rank(dy, "dy", 2);
  validate.shape(dy, "dy", {x.shape[0], dy.shape[1]});
  validate_lora_groups(validate, "lora_backward_grouped", x, dy.shape[1], adapters, groups, t);
  for (std::size_t i = 0; i < adapters.size(); ++i) {
    const auto& [lora_a, lora_b, grad_a, grad_b] = adapters[i];
    const std::string a = message("grad_a[", i, "]"), b = message("grad_b[", i, "]");
    validate.dtype(grad_a, a.c_str(), lora_a.dtype);
    validate.shape(grad_a, a.c_str(), lora_a.shape);
    validate.dtype(grad_b, b.c_str(), lora_b.dtype);
    validate.shape(grad_b, b.c_str(), lora_b.shape);
  }
  if (dx.is_present) {
    validate.dtype(dx, "dx", x.dtype);
    validate.shape(dx, "dx", x.shape);
  }
  backend_for(x.device).lora_backward_grouped(arguments, context);
}

void dora_scale(const DoRAScale& arguments, const ExecutionContext& context) {
  const auto& [rows, gain, addend, bias, y] = arguments;
  const Validator validate("dora_scale", rows.device);
  validate.float_dtype(rows, "rows");
  validate.rank(rows, "rows", 2);
  validate.dtype(gain, "gain", DType::float32);
  validate.shape(gain, "gain", {rows.shape[1]});
  if (addend.is_present) {
    validate.dtype(addend, "addend", rows.dtype);
    validate.shape(addend, "addend", rows.shape);
  }
  if (bias.is_present) {
    validate.dtype(bias, "bias", rows.dtype);
    validate.shape(bias, "bias", {rows.shape[1]});
  }
  validate.dtype(y, "y", rows.dtype);
  validate.shape(y, "y", rows.shape);
  backend_for(rows.device).dora_scale(arguments, context);
}

void dora_scale_backward(const DoRAScaleBackward& arguments, const ExecutionContext& context) {
  const auto& [dy, rows, gain, scaled, sums] = arguments;
  const Validator validate("dora_scale_backward", dy.device);
  validate.float_dtype(dy, "dy");
  validate.rank(dy, "dy", 2);
  validate.dtype(gain, "gain", DType::float32);
  validate.shape(gain, "gain", {dy.shape[1]});
  validate.dtype(scaled, "scaled", dy.dtype);
  validate.shape(scaled, "scaled", dy.shape);
  check(rows.is_present == sums.is_present,
        "dora_scale_backward: rows and sums come together or not at all");
  if (rows.is_present) {
    validate.dtype(rows, "rows", dy.dtype);
    validate.shape(rows, "rows", dy.shape);
    validate.dtype(sums, "sums", DType::float32);
    validate.shape(sums, "sums", {dy.shape[1]});
  }
  backend_for(dy.device).dora_scale_backward(arguments, context);
}

void dropout(const TensorView& x, double p, const TensorView& seed, const TensorView& out,
             const ExecutionContext& context) {
  const Validator validate("dropout", x.device);
  validate.float_dtype(x, "x");
  check(p >= 0.0 && p < 1.0, "dropout: p is ", p, ", want 0 <= p < 1");
  validate.dtype(seed, "seed", DType::int64);
  validate.numel(seed, "seed", 1);
  validate.dtype(out, "out", x.dtype);
  validate.shape(out, "out", x.shape);
  backend_for(x.device).dropout(x, p, seed, out, context);
}

namespace {

void validate_optimizer_numbers(const char* operation, const OptimizerNumbers& step) {
  const auto at_least_zero = [&](double value, const char* argument) {
    check(std::isfinite(value) && value >= 0.0, operation, ": ", argument, " is ", value,
          ", want a finite number of at least 0");
  };
  at_least_zero(step.lr, "lr");
  at_least_zero(step.eps, "eps");
  at_least_zero(step.weight_decay, "weight_decay");
  check(step.beta1 >= 0.0 && step.beta1 < 1.0, operation, ": beta1 is ", step.beta1,
        ", want 0 <= beta1 < 1");
  check(step.beta2 >= 0.0 && step.beta2 < 1.0, operation, ": beta2 is ", step.beta2,
        ", want 0 <= beta2 < 1");
  check(step.step >= 1, operation, ": step is ", step.step, ", want at least 1");
}

/// A number in the memory of the operation's device, if it is there.
void validate_device_number(const Validator& validate, const TensorView& number,
                            const char* argument) {
  if (!number.is_present) return;
  validate.dtype(number, argument, DType::float32);
  validate.numel(number, argument, 1);
}

void validate_device_numbers(const Validator& validate, const OptimizerStep& step) {
  validate_device_number(validate, step.lr_tensor, "lr_tensor");
  validate_device_number(validate, step.grad_scale, "grad_scale");
  validate_device_number(validate, step.found_inf, "found_inf");
}

/// What a parameter has beside its state.
void validate_parameter(const char* operation, const Validator& validate, const TensorView& param,
                        const TensorView& grad, const TensorView& step_count, std::int64_t number,
                        std::int64_t first_element, const OptimizerStep& step) {
  validate.float_dtype(param, "param");
  validate.float_dtype(grad, "grad");
  validate.shape(grad, "grad", param.shape);
  validate_device_number(validate, step_count, "step_count");
  check(first_element >= 0 && first_element % state_block_size == 0, operation,
        ": first_element is ", first_element, ", want a multiple of ", state_block_size);
  if (!step.rounding_seed) return;
  check(param.dtype != DType::float16, operation,
        ": param is float16, and stochastic rounding is for bfloat16 (float32 is not rounded)");
  check(number >= 0 && number <= RoundingStream::max_number, operation, ": number is ", number,
        ", want 0 to ", RoundingStream::max_number);
}

void validate_moment(const char* operation, const Validator& validate, std::int64_t count,
                     bool is_8bit, const TensorView& moment, const char* moment_name,
                     const TensorView& absmax, const char* absmax_name) {
  validate.dtype(moment, moment_name, is_8bit ? DType::uint8 : DType::float32);
  validate.numel(moment, moment_name, count);
  check(absmax.is_present == is_8bit, operation, ": ", absmax_name, " is ",
        is_8bit ? "missing" : "given", ", but the first parameter's state is of ", is_8bit ? 8 : 32,
        " bits");
  if (!is_8bit) return;
  validate.dtype(absmax, absmax_name, DType::float32);
  validate.numel(absmax, absmax_name, ceil_divide(count, state_block_size));
}

}  // namespace

void optimizer_step(OptimizerRule rule, std::span<const OptimizerTensor> tensors,
                    const OptimizerStep& step, const ExecutionContext& context) {
  const bool is_8bit = !tensors.empty() && tensors.front().state.is_8bit();
  const char* const operation = optimizer_step_name(rule, is_8bit);
  validate_optimizer_numbers(operation, step);
  if (tensors.empty()) return;
  const Device device = tensors.front().param.device;
  const Validator validate(operation, device);
  validate_device_numbers(validate, step);
  for (const OptimizerTensor& tensor : tensors) {
    validate_parameter(operation, validate, tensor.param, tensor.grad, tensor.step_count,
                       tensor.number, tensor.first_element, step);
    const std::int64_t count = tensor.param.numel();
    const OptimizerState& state = tensor.state;
    validate_moment(operation, validate, count, is_8bit, state.exp_avg, "exp_avg",
                    state.exp_avg_absmax, "exp_avg_absmax");
    if (rule == OptimizerRule::lion) continue;
    validate_moment(operation, validate, count, is_8bit, state.exp_avg_sq, "exp_avg_sq",
                    state.exp_avg_sq_absmax, "exp_avg_sq_absmax");
  }
  backend_for(device).optimizer_step(rule, tensors, step, context);
}

void validate_paged_optimizer_step(const PagedState& state, std::span<const PagedTensor> tensors,
                                   const OptimizerStep& step) {
  const char* const operation = optimizer_step_name(state.rule(), state.is_8bit());
  validate_optimizer_numbers(operation, step);
  const Validator validate(operation, state.device());
  validate_device_numbers(validate, step);
  std::int64_t begin = 0;  // of what the tensors before leave
  for (const PagedTensor& tensor : tensors) {
    validate_parameter(operation, validate, tensor.param, tensor.grad, tensor.step_count,
                       tensor.number, tensor.first_element, step);
    check(tensor.first_element >= begin, operation, ": first_element is ", tensor.first_element,
          ", but the state before it goes on to element ", begin);
    begin = tensor.first_element + tensor.param.numel();
    check(begin <= state.elements() && tensor.first_element < state.elements(), operation,
          ": the state of a param begins at element ", tensor.first_element, " and has ",
          tensor.param.numel(), ", but the pages have ", state.elements());
  }
}

void paged_optimizer_step(PagedState& state, std::span<const PagedTensor> tensors,
                          const OptimizerStep& step, const ExecutionContext& context) {
  prepare_paged_optimizer_step(state, tensors, step, context)();
}

std::function<void()> prepare_paged_optimizer_step(PagedState& state,
                                                   std::span<const PagedTensor> tensors,
                                                   const OptimizerStep& step,
                                                   const ExecutionContext& context) {
  validate_paged_optimizer_step(state, tensors, step);
  if (tensors.empty()) return [] {};
  return backend_for(state.device()).prepare_paged_optimizer_step(state, tensors, step, context);
}

}  // namespace qlora
