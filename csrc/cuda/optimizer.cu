// Puts lists of parameters into launches of the optimisers' kernels, and queues them.
#include "cuda/optimizer.h"

#include <algorithm>
#include <memory>
#include <optional>
#include <type_traits>

#include "cuda/launch.cuh"
#include "cuda/optimizer.cuh"
#include "cuda/optimizer8bit.cuh"

namespace qlora::cuda {
namespace {

FloatKind kind_of(DType dtype) {
  switch (dtype) {
    case DType::float32: return FloatKind::float32;
    case DType::bfloat16: return FloatKind::bfloat16;
    case DType::float16: return FloatKind::float16;
    default: throw_no_float_kernel(dtype);
  }
}

/// Whether a quad of a tensor is one access.
bool is_quad_aligned(const TensorView& tensor) {
  const auto address = reinterpret_cast<std::uintptr_t>(tensor.data);
  const auto element = static_cast<std::uintptr_t>(element_bytes(tensor.dtype));
  return address % (elements_per_quad * element) == 0;
}

OptimizerEntry entry_of(const OptimizerTensor& tensor) {
  const OptimizerState& state = tensor.state;
  OptimizerEntry entry{
      .param = tensor.param.data,
      .grad = tensor.grad.data,
      .moments = {state.exp_avg.data, state.exp_avg_sq.data},
      .absmaxes = {state.exp_avg_absmax.as<float>(), state.exp_avg_sq_absmax.as<float>()},
      .first_counter = RoundingStream::counter_of(tensor.number, tensor.first_element),
      .count = tensor.param.numel(),
      .is_aligned = true,
      .param_kind = kind_of(tensor.param.dtype),
      .grad_kind = kind_of(tensor.grad.dtype)};
  for (const TensorView* view : {&tensor.param, &tensor.grad, &state.exp_avg, &state.exp_avg_sq}) {
    entry.is_aligned &= is_quad_aligned(*view);
  }
  return entry;
}

const float* device_number(const TensorView& number) {
  return number.is_present ? number.as<const float>() : nullptr;
}

template <typename... Parameters>
void load(void (*kernel)(Parameters...), const char* operation) {
  load_kernel(reinterpret_cast<const void*>(kernel), operation);
}

/// What one kernel of a step is launched with, but for its arguments.
template <typename Rule>
struct StepKernel {
  void (*kernel)(OptimizerArguments<Rule>);
  std::uint32_t max_thread_blocks;  // what is beyond them goes round the kernel's loop
  int shared_bytes;
};

template <typename Rule, bool is_stochastic>
StepKernel<Rule> step_kernel(bool is_8bit, const char* operation) {
  if (!is_8bit) return {optimizer_kernel<Rule, is_stochastic>, 65535, 0};
  int device = 0;
  check_cuda(cudaGetDevice(&device), operation);
  const int resident = device_traits(device, operation).multiprocessor_count *
                       optimizer8bit_thread_blocks_per_multiprocessor<Rule, is_stochastic>;
  return {optimizer8bit_kernel<Rule, is_stochastic>, static_cast<std::uint32_t>(resident),
          moment_tables_bytes<Rule>};
}

/// The two kernels' arguments for as many tensors as one launch takes: 40 KB.
template <typename Rule>
struct Batch {
  OptimizerArguments<Rule> step;
  OptimizerRuleArguments<Rule> rules;

  Batch(const OptimizerStep& s, TensorRule<Rule>* memory_of_rules)
      : step{.rule = TensorRule<Rule>(s),
             .rules = memory_of_rules,
             .found_inf = device_number(s.found_inf),
             .rounding_seed = s.rounding_seed.value_or(0),
             .chunks = {},
             .tensors = {}},
        rules{.rules = memory_of_rules,
              .numbers = s,
              .lr = device_number(s.lr_tensor),
              .grad_scale = device_number(s.grad_scale),
              .found_inf = step.found_inf,
              .tensor_count = 0,
              .step_counts = {},
              .counts_step = {}} {}

  /// Begins anew, and takes tensors as long as they fit. Returns how many.
  std::size_t take(std::span<const OptimizerTensor> tensors) {
    step.chunks = {};
    for (const OptimizerTensor& tensor : tensors) {
      const int index = step.chunks.tensor_count();
      if (!step.chunks.append(tensor.param.numel())) break;
      step.tensors[index] = entry_of(tensor);
      rules.step_counts[index] = const_cast<float*>(device_number(tensor.step_count));
      rules.counts_step[index] = tensor.counts_step;
    }
    rules.tensor_count = step.chunks.tensor_count();
    return static_cast<std::size_t>(rules.tensor_count);
  }
};

}  // namespace

class OptimizerLaunch::Batches {
 public:
  virtual ~Batches() = default;
  virtual void launch_each(std::span<const OptimizerTensor> tensors) = 0;
};

namespace {

template <typename Rule>
class BatchesOf final : public OptimizerLaunch::Batches {
 public:
  BatchesOf(const char* operation, bool is_8bit, const OptimizerStep& step, bool has_step_counts,
            cudaStream_t stream)
      : operation_(operation),
        stream_(stream),
        kernel_(step.rounding_seed ? step_kernel<Rule, true>(is_8bit, operation)
                                   : step_kernel<Rule, false>(is_8bit, operation)) {
    check_stream(stream, operation);  // scratch memory comes before a launch
    load(kernel_.kernel, operation);
    if (step.lr_tensor.is_present || step.grad_scale.is_present || has_step_counts) {
      load(optimizer_rules_kernel<Rule>, operation);
      memory_.emplace(sizeof(TensorRule<Rule>) * tensors_per_launch, stream, operation);
    }
    batch_ = std::make_unique<Batch<Rule>>(
        step, memory_ ? reinterpret_cast<TensorRule<Rule>*>(memory_->data()) : nullptr);
  }

  void launch_each(std::span<const OptimizerTensor> tensors) override {
    for (const OptimizerTensor& tensor : tensors) {
      check(memory_ || !tensor.step_count.is_present, operation_,
            ": step_count is present, want none in a launch that was made without");
    }
    while (!tensors.empty()) {
      const std::size_t taken = batch_->take(tensors);
      check(taken > 0, operation_, ": a parameter has ", tensors.front().param.numel(),
            " elements, more than a launch takes");
      tensors = tensors.subspan(taken);
      launch_batch();
    }
  }

 private:
  void launch_batch() const {
    const OptimizerArguments<Rule>& step = batch_->step;
    if (memory_) {
      const auto thread_blocks = ceil_divide(batch_->rules.tensor_count, rule_threads);
      launch(operation_, optimizer_rules_kernel<Rule>,
             {static_cast<unsigned>(thread_blocks), rule_threads}, stream_, batch_->rules);
    }
    if (step.chunks.chunk_count() == 0) return;
    launch(operation_, kernel_.kernel,
           {std::min(step.chunks.chunk_count(), kernel_.max_thread_blocks), optimizer_threads,
            kernel_.shared_bytes},
           stream_, step);
  }

  const char* operation_;
  cudaStream_t stream_;
  StepKernel<Rule> kernel_;
  std::optional<StreamBuffer> memory_;
  std::unique_ptr<Batch<Rule>> batch_;
};

}  // namespace

OptimizerLaunch::OptimizerLaunch(OptimizerRule rule, bool is_8bit, const OptimizerStep& step,
                                 bool has_step_counts, cudaStream_t stream) {
  const char* const operation = optimizer_step_name(rule, is_8bit);
  check_driver(12010, operation, "a launch carries 30 KB of parameters");
  const auto make_batches = [&]<typename Rule>(std::type_identity<Rule>) {
    batches_ = std::make_unique<BatchesOf<Rule>>(operation, is_8bit, step, has_step_counts, stream);
  };
  switch (rule) {
    case OptimizerRule::adamw: make_batches(std::type_identity<AdamWRule>()); break;
    case OptimizerRule::lion: make_batches(std::type_identity<LionRule>()); break;
  }
}

OptimizerLaunch::~OptimizerLaunch() = default;

void OptimizerLaunch::operator()(std::span<const OptimizerTensor> tensors) {
  batches_->launch_each(tensors);
}

}  // namespace qlora::cuda
