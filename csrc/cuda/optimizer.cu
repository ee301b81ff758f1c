// Puts lists of parameters into launches of the optimisers' kernels, and queues them.
#include "cuda/optimizer.h"

#include <algorithm>
#include <memory>
#include <optional>

#include "cuda/launch.cuh"
#include "cuda/optimizer.cuh"
#include "cuda/optimizer8bit.cuh"

namespace qlora::cuda {
namespace {

// What is beyond it goes round the kernel's loop.
constexpr std::uint32_t max_thread_blocks = 65535;

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
  OptimizerEntry entry{.param = tensor.param.data,
                       .grad = tensor.grad.data,
                       .exp_avg = state.exp_avg.data,
                       .exp_avg_sq = state.exp_avg_sq.data,
                       .exp_avg_absmax = state.exp_avg_absmax.as<float>(),
                       .exp_avg_sq_absmax = state.exp_avg_sq_absmax.as<float>(),
                       .count = tensor.param.numel(),
                       .param_kind = kind_of(tensor.param.dtype),
                       .grad_kind = kind_of(tensor.grad.dtype),
                       .is_aligned = true};
  for (const TensorView* view : {&tensor.param, &tensor.grad, &state.exp_avg, &state.exp_avg_sq}) {
    entry.is_aligned &= is_quad_aligned(*view);
  }
  return entry;
}

const float* device_number(const TensorView& number) {
  return number.is_present ? number.as<const float>() : nullptr;
}

/// The two kernels' arguments for as many tensors as one launch takes.
struct Batch {
  OptimizerArguments step;
  OptimizerRuleArguments rules;

  Batch(const OptimizerStep& s, AdamWRule* memory_of_rules)
      : step{.rule = AdamWRule(s),
             .rules = memory_of_rules,
             .found_inf = device_number(s.found_inf),
             .chunks = {},
             .tensors = {}},
        rules{.rules = memory_of_rules,
              .numbers = s,
              .lr = device_number(s.lr_tensor),
              .grad_scale = device_number(s.grad_scale),
              .found_inf = step.found_inf,
              .tensor_count = 0,
              .step_counts = {}} {}

  /// Returns false where the tensor does not fit any more.
  bool append(const OptimizerTensor& tensor) {
    const OptimizerEntry entry = entry_of(tensor);
    const int index = step.chunks.tensor_count();
    if (!step.chunks.append(entry.count)) return false;
    step.tensors[index] = entry;
    rules.step_counts[index] = const_cast<float*>(device_number(tensor.step_count));
    rules.tensor_count = step.chunks.tensor_count();
    return true;
  }
};

bool has_numbers_on_device(std::span<const OptimizerTensor> tensors, const OptimizerStep& step) {
  return step.lr_tensor.is_present || step.grad_scale.is_present ||
         std::any_of(tensors.begin(), tensors.end(),
                     [](const OptimizerTensor& tensor) { return tensor.step_count.is_present; });
}

/// Makes batches of the tensors, and calls `launch_step` with the arguments of each.
template <typename LaunchStep>
void launch_batches(std::span<const OptimizerTensor> tensors, const OptimizerStep& step,
                    const char* operation, cudaStream_t stream, LaunchStep&& launch_step) {
  check_driver(12010, operation, "a launch carries 30 KB of parameters");
  std::optional<StreamBuffer> memory;
  if (has_numbers_on_device(tensors, step)) {
    memory.emplace(sizeof(AdamWRule) * tensors_per_launch, stream, operation);
  }
  auto* const rules = memory ? reinterpret_cast<AdamWRule*>(memory->data()) : nullptr;
  while (!tensors.empty()) {
    const auto batch = std::make_unique<Batch>(step, rules);  // 40 KB
    std::size_t taken = 0;
    while (taken < tensors.size() && batch->append(tensors[taken])) ++taken;
    check(taken > 0, operation, ": a parameter has ", tensors.front().param.numel(),
          " elements, more than a launch takes");
    tensors = tensors.subspan(taken);
    if (rules != nullptr) {
      launch(operation, optimizer_rules_kernel,
             {static_cast<unsigned>(ceil_divide(batch->rules.tensor_count, rule_threads)),
              rule_threads},
             stream, batch->rules);
    }
    if (batch->step.chunks.chunk_count() > 0) launch_step(batch->step);
  }
}

}  // namespace

void launch_adamw_step(std::span<const OptimizerTensor> tensors, const OptimizerStep& step,
                       cudaStream_t stream) {
  const char* const operation = "adamw_step";
  launch_batches(tensors, step, operation, stream, [&](const OptimizerArguments& arguments) {
    launch(operation, optimizer_kernel,
           {std::min(arguments.chunks.chunk_count(), max_thread_blocks), optimizer_threads}, stream,
           arguments);
  });
}

void launch_adamw8bit_step(std::span<const OptimizerTensor> tensors, const OptimizerStep& step,
                           cudaStream_t stream) {
  const char* const operation = "adamw8bit_step";
  const DeviceTraits& device = device_traits(tensors.front().param.device.index, operation);
  const auto resident = static_cast<std::uint32_t>(optimizer8bit_thread_blocks_per_multiprocessor *
                                                   device.multiprocessor_count);
  launch_batches(tensors, step, operation, stream, [&](const OptimizerArguments& arguments) {
    launch(operation, optimizer8bit_kernel,
           {std::min(arguments.chunks.chunk_count(), resident), optimizer_threads,
            optimizer8bit_shared_bytes},
           stream, arguments);
  });
}

}  // namespace qlora::cuda
