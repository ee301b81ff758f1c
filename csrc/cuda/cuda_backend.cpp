// The operations of the CUDA backend: the right device, the caller's stream, and what the kernels
// demand of their arguments.
#include <algorithm>

#include "core/backend.h"
#include "core/paged_walk.h"
#include "cuda/dropout.h"
#include "cuda/lora.h"
#include "cuda/nf4_codec.h"
#include "cuda/nf4_matmul_dispatch.h"
#include "cuda/optimizer.h"
#include "cuda/paged_buffer.h"
#include "cuda/runtime.h"

namespace qlora {
namespace {

using cuda::check_cuda;
using cuda::DeviceGuard;

cudaStream_t stream_of(const ExecutionContext& context) {
  return static_cast<cudaStream_t>(context.stream);
}

void check_aligned(const TensorView& scales, const char* operation, const char* argument) {
  if (!scales.is_present) return;
  const auto address = reinterpret_cast<std::uintptr_t>(scales.data);
  check(address % 4 == 0, operation, ": ", argument, " holds fp32 scales, but its memory begins ",
        address % 4, " bytes past a multiple of 4; pass ", argument, ".clone()");
}

/// The kernels read fp32 scales as fp32, which the tensors' dtype, uint8, does not promise to be
/// possible.
void check_scales_aligned(const NF4Weight& weight, const char* operation) {
  if (!weight.is_nested()) check_aligned(weight.absmax, operation, "absmax");
  check_aligned(weight.nested_absmax, operation, "nested_absmax");
  check_aligned(weight.nested_offset, operation, "nested_offset");
}

template <typename Tensor>
bool has_step_counts(std::span<const Tensor> tensors) {
  return std::any_of(tensors.begin(), tensors.end(),
                     [](const Tensor& tensor) { return tensor.step_count.is_present; });
}

class CudaBackend final : public Backend {
 public:
  const char* name() const override { return "CUDA"; }

  /// Waits for the stream once, at the end, to learn whether w had a NaN or Inf.
  void nf4_quantize(const TensorView& w, const NF4Weight& out,
                    const ExecutionContext& context) const override {
    const char* const operation = "nf4_quantize";
    check_scales_aligned(out, operation);
    const DeviceGuard guard(w.device, operation);
    const cudaStream_t stream = stream_of(context);
    cuda::check_stream(stream, operation);  // scratch memory and copies come before a launch
    cuda::refuse_capture(stream, operation);
    const cuda::StreamBuffer memory(cuda::NF4QuantizeScratch::bytes_for(out), stream, operation);
    const cuda::NF4QuantizeScratch scratch(memory.data(), out);
    cuda::launch_nf4_quantize(w, out, scratch, stream);

    unsigned long long bad = cuda::no_bad_block;
    check_cuda(
        cudaMemcpyAsync(&bad, scratch.first_bad_block, sizeof bad, cudaMemcpyDeviceToHost, stream),
        operation);
    check_cuda(cudaStreamSynchronize(stream), operation);
    if (bad != cuda::no_bad_block) throw_not_finite(static_cast<std::int64_t>(bad), out);
  }

  void nf4_dequantize(const NF4Weight& weight, const TensorView& out,
                      const ExecutionContext& context) const override {
    check_scales_aligned(weight, "nf4_dequantize");
    const DeviceGuard guard(out.device, "nf4_dequantize");
    cuda::launch_nf4_dequantize(weight, out, stream_of(context));
  }

  void nf4_dequantize_absmax(const NF4Weight& weight, const TensorView& out,
                             const ExecutionContext& context) const override {
    check_scales_aligned(weight, "nf4_dequantize_absmax");
    const DeviceGuard guard(out.device, "nf4_dequantize_absmax");
    cuda::check_stream(stream_of(context), "nf4_dequantize_absmax");  // plain scales are copied
    cuda::launch_nf4_dequantize_absmax(weight, out.as<float>(), stream_of(context));
  }

  void nf4_linear(const TensorView& x, const NF4Weight& weight, const TensorView& bias,
                  const TensorView& y, const ExecutionContext& context) const override {
    check_scales_aligned(weight, "nf4_linear");
    const DeviceGuard guard(x.device, "nf4_linear");
    cuda::run_nf4_matmul({cuda::Direction::forward, x, y, weight, bias}, stream_of(context));
  }

  void nf4_linear_grad_input(const TensorView& dy, const NF4Weight& weight, const TensorView& dx,
                             const ExecutionContext& context) const override {
    check_scales_aligned(weight, "nf4_linear_grad_input");
    const DeviceGuard guard(dy.device, "nf4_linear_grad_input");
    cuda::run_nf4_matmul({cuda::Direction::grad_input, dy, dx, weight, {}}, stream_of(context));
  }

  void lora_forward(const LoRAForward& arguments, const ExecutionContext& context) const override {
    const DeviceGuard guard(arguments.x.device, "lora_forward");
    cuda::launch_lora_forward(arguments, stream_of(context));
  }

  void lora_backward(const LoRABackward& arguments,
                     const ExecutionContext& context) const override {
    const DeviceGuard guard(arguments.x.device, "lora_backward");
    cuda::launch_lora_backward(arguments, stream_of(context));
  }

  void dropout(const TensorView& x, double p, const TensorView& seed, const TensorView& out,
               const ExecutionContext& context) const override {
    const DeviceGuard guard(x.device, "dropout");
    cuda::launch_dropout(x, p, seed, out, stream_of(context));
  }

  void optimizer_step(OptimizerRule rule, std::span<const OptimizerTensor> tensors,
                      const OptimizerStep& step, const ExecutionContext& context) const override {
    const bool is_8bit = tensors.front().state.is_8bit();
    const DeviceGuard guard(tensors.front().param.device, optimizer_step_name(rule, is_8bit));
    cuda::OptimizerLaunch(rule, is_8bit, step, has_step_counts(tensors),
                          stream_of(context))(tensors);
  }

  std::function<void()> prepare_paged_optimizer_step(
      PagedState& state, std::span<const PagedTensor> tensors, const OptimizerStep& step,
      const ExecutionContext& context) const override {
    const char* const operation = optimizer_step_name(state.rule(), state.is_8bit());
    const DeviceGuard guard(state.device(), operation);
    const auto launch = std::make_shared<cuda::OptimizerLaunch>(
        state.rule(), state.is_8bit(), step, has_step_counts(tensors), stream_of(context));
    return [launch, operation, &state, tensors, context] {
      const DeviceGuard on_device(state.device(), operation);
      walk_pages(state, tensors, context.stream, *launch);
    };
  }

  std::unique_ptr<PagedBuffer> make_paged_buffer(Device device,
                                                 const PagedBufferOptions& options) const override {
    return cuda::make_cuda_paged_buffer(device, options);
  }
};

}  // namespace

const Backend& cuda_backend() {
  static const CudaBackend backend;
  return backend;
}

CudaInfo cuda_info() {
  return {.is_compiled = true, .architectures = QLORA_CUDA_ARCHS, .compiler = QLORA_CUDA_COMPILER};
}

std::string cuda_nf4_matmul_strategy(const NF4MatmulShape& shape, int index) {
  return name_of(cuda::advise_nf4_matmul(shape, cuda::device_traits(index, "nf4_matmul_strategy")));
}

}  // namespace qlora
