// What a backend implements: the operations of core/operations.h, called with arguments that have
// been validated.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "core/operations.h"
#include "core/paged_buffer.h"
#include "core/paged_state.h"

namespace qlora {

class Backend {
 public:
  virtual ~Backend() = default;

  /// What `build_info` and messages call it.
  virtual const char* name() const = 0;

  // An operation that a backend does not override is Unsupported there, by name.
  virtual void nf4_quantize(const TensorView& w, const NF4Weight& out,
                            const ExecutionContext& context) const;
  virtual void nf4_dequantize(const NF4Weight& weight, const TensorView& out,
                              const ExecutionContext& context) const;
  virtual void nf4_dequantize_absmax(const NF4Weight& weight, const TensorView& out,
                                     const ExecutionContext& context) const;
  virtual void nf4_linear(const TensorView& x, const NF4Weight& weight, const TensorView& bias,
                          const TensorView& y, const ExecutionContext& context) const;
  virtual void nf4_linear_grad_input(const TensorView& dy, const NF4Weight& weight,
                                     const TensorView& dx, const ExecutionContext& context) const;
  virtual void lora_forward(const LoRAForward& arguments, const ExecutionContext& context) const;
  virtual void lora_backward(const LoRABackward& arguments, const ExecutionContext& context) const;
  virtual void lora_forward_grouped(const LoRAForwardGrouped& arguments,
                                    const ExecutionContext& context) const;
  virtual void lora_backward_grouped(const LoRABackwardGrouped& arguments,
                                     const ExecutionContext& context) const;
  virtual void dora_scale(const DoRAScale& arguments, const ExecutionContext& context) const;
  virtual void dora_scale_backward(const DoRAScaleBackward& arguments,
                                   const ExecutionContext& context) const;
  virtual void dropout(const TensorView& x, double p, const TensorView& seed, const TensorView& out,
                       const ExecutionContext& context) const;
  virtual void optimizer_step(OptimizerRule rule, std::span<const OptimizerTensor> tensors,
                              const OptimizerStep& step, const ExecutionContext& context) const;
  virtual std::function<void()> prepare_paged_optimizer_step(PagedState& state,
                                                             std::span<const PagedTensor> tensors,
                                                             const OptimizerStep& step,
                                                             const ExecutionContext& context) const;
  virtual std::unique_ptr<PagedBuffer> make_paged_buffer(Device device,
                                                         const PagedBufferOptions& options) const;

 protected:
  [[noreturn]] void refuse(const char* operation) const;
};

/// What nf4_quantize throws when `block` is the first that holds a NaN or Inf.
[[noreturn]] void throw_not_finite(std::int64_t block, const NF4Weight& weight);

/// The two backends; the folders cpu/ and cuda/ define them. cuda_backend throws Unsupported in a
/// build without CUDA.
const Backend& cpu_backend();
const Backend& cuda_backend();

/// The backend of a device.
const Backend& backend_for(Device device);

/// What was compiled and what is in use, for `build_info`.
struct CpuInfo {
  std::vector<std::string> sets;  // compiled, and this processor has them; best last
  std::string active_set;
};
CpuInfo cpu_info();

struct CudaInfo {
  bool is_compiled = false;
  std::string architectures;  // comma-separated; empty without CUDA
  std::string compiler;
};
CudaInfo cuda_info();

/// The GPUs that the driver shows, and why none, or some, cannot be used.
///
/// This starts the driver, which a forked child cannot use from then on: call it when asked, and
/// never on import.
struct CudaDeviceReport {
  std::vector<std::string> usable;    // "cuda:0 NVIDIA H200, compute capability 9.0"
  std::vector<std::string> problems;  // a sentence each; none only if every device is usable
};
CudaDeviceReport cuda_device_report();  // throws std::bad_alloc alone

/// A product with an NF4 weight, by its sizes: nf4_linear's, or nf4_linear_grad_input's.
struct NF4MatmulShape {
  bool is_grad_input = false;
  std::int64_t m = 0, n = 0, k = 0;
  DType dtype = DType::bfloat16;
  std::int64_t block_size = 64;
};

/// How a product is computed best on CUDA device `index`, if its tensors are as aligned as fresh
/// ones: "plain", "few_tokens" or "tiles", which are kernels of the core, or "workspace", which asks
/// the caller to dequantise the weight and multiply with that. (The core then has a slower kernel.)
std::string cuda_nf4_matmul_strategy(const NF4MatmulShape& shape, int index);

}  // namespace qlora
