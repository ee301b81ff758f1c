#include <algorithm>

#include "core/backend.h"

namespace qlora {

const Backend& backend_for(Device device) {
  switch (device.type) {
    case DeviceType::cpu: return cpu_backend();
    case DeviceType::cuda: return cuda_backend();
  }
  throw Unsupported(message("no backend for device ", device));
}

void throw_not_finite(std::int64_t block, const NF4Weight& weight) {
  const std::int64_t first = block * weight.block_size;
  const std::int64_t last = std::min(first + weight.block_size, weight.n * weight.k) - 1;
  throw InvalidArgument(message("nf4_quantize: w has a NaN or Inf in block ", block, ", elements ",
                                first, " to ", last, " of the flattened weight"));
}

void Backend::refuse(const char* operation) const {
  throw Unsupported(
      message(operation, ": the ", name(), " backend does not have this operation yet"));
}

void Backend::nf4_quantize(const TensorView&, const NF4Weight&, const ExecutionContext&) const {
  refuse("nf4_quantize");
}
void Backend::nf4_dequantize(const NF4Weight&, const TensorView&, const ExecutionContext&) const {
  refuse("nf4_dequantize");
}
void Backend::nf4_dequantize_absmax(const NF4Weight&, const TensorView&,
                                    const ExecutionContext&) const {
  refuse("nf4_dequantize_absmax");
}
void Backend::nf4_linear(const TensorView&, const NF4Weight&, const TensorView&, const TensorView&,
                         const ExecutionContext&) const {
  refuse("nf4_linear");
}
void Backend::nf4_linear_grad_input(const TensorView&, const NF4Weight&, const TensorView&,
                                    const ExecutionContext&) const {
  refuse("nf4_linear_grad_input");
}
void Backend::lora_forward(const LoRAForward&, const ExecutionContext&) const {
  refuse("lora_forward");
}
void Backend::lora_backward(const LoRABackward&, const ExecutionContext&) const {
  refuse("lora_backward");
}
void Backend::lora_forward_grouped(const LoRAForwardGrouped&, const ExecutionContext&) const {
  refuse("lora_forward_grouped");
}
void Backend::lora_backward_grouped(const LoRABackwardGrouped&, const ExecutionContext&) const {
  refuse("lora_backward_grouped");
}
void Backend::dora_scale(const DoRAScale&, const ExecutionContext&) const { refuse("dora_scale"); }
void Backend::dora_scale_backward(const DoRAScaleBackward&, const ExecutionContext&) const {
  refuse("dora_scale_backward");
}
void Backend::dropout(const TensorView&, double, const TensorView&, const TensorView&,
                      const ExecutionContext&) const {
  refuse("dropout");
}
void Backend::optimizer_step(OptimizerRule, std::span<const OptimizerTensor>, const OptimizerStep&,
                             const ExecutionContext&) const {
  refuse("optimizer_step");
}
std::function<void()> Backend::prepare_paged_optimizer_step(PagedState&,
                                                            std::span<const PagedTensor>,
                                                            const OptimizerStep&,
                                                            const ExecutionContext&) const {
  refuse("paged_optimizer_step");
}
std::unique_ptr<PagedBuffer> Backend::make_paged_buffer(Device, const PagedBufferOptions&) const {
  refuse("make_paged_buffer");
}

}  // namespace qlora
