// Splits each operation's range over threads.
#include <algorithm>
#include <atomic>
#include <memory>
#include <numeric>
#include <vector>

#include "core/backend.h"
#include "core/paged_walk.h"
#include "cpu/instruction_sets.h"
#include "cpu/lora_groups.h"
#include "cpu/paged_buffer.h"
#include "cpu/thread_pool.h"
#include "cpu/work_split.h"

namespace qlora {
namespace {

NF4Bytes bytes_of(const NF4Weight& weight) {
  const auto bytes = [](const TensorView& tensor) {
    return tensor.is_present ? tensor.as<std::uint8_t>() : nullptr;
  };
  return {.codes = bytes(weight.codes),
          .absmax = bytes(weight.absmax),
          .nested_absmax = bytes(weight.nested_absmax),
          .nested_offset = bytes(weight.nested_offset),
          .n = weight.n,
          .k = weight.k,
          .block_size = weight.block_size};
}

bool is_skipped(const OptimizerStep& step) {
  return step.found_inf.is_present && *step.found_inf.as<const float>() != 0.0f;
}

/// The numbers of a tensor's step, read from where they are.
OptimizerNumbers numbers_of(const OptimizerStep& step, const TensorView& step_count) {
  OptimizerNumbers numbers = step;
  if (step.lr_tensor.is_present) {
    numbers.lr = static_cast<double>(*step.lr_tensor.as<const float>());
  }
  if (step_count.is_present) {
    numbers.step = static_cast<std::int64_t>(*step_count.as<const float>()) + 1;
  }
  return numbers;
}

/// Elements [begin, end) of a tensor; begin is a multiple of 256. Rules are made for every piece of
/// a tensor, which has thousands of elements.
void step_piece(OptimizerRule rule, const OptimizerTensor& tensor, const OptimizerStep& step,
                std::int64_t begin, std::int64_t end) {
  const OptimizerNumbers numbers = numbers_of(step, tensor.step_count);
  const float grad_scale = step.grad_scale.is_present ? *step.grad_scale.as<const float>() : 1.0f;
  const RoundingStream stream{
      .seed = step.rounding_seed.value_or(0),
      .first_counter = RoundingStream::counter_of(tensor.number, tensor.first_element),
      .step = static_cast<std::uint32_t>(numbers.step)};
  const RoundingStream* const rounding = step.rounding_seed ? &stream : nullptr;
  const bool is_8bit = tensor.state.is_8bit();
  if (is_8bit) {
    begin /= state_block_size;
    end = ceil_divide(end, state_block_size);
  }
  switch (rule) {
    case OptimizerRule::adamw:
      (is_8bit ? kernels().adamw8bit_step : kernels().adamw_step)(
          tensor, AdamWRule(numbers, grad_scale), rounding, begin, end);
      return;
    case OptimizerRule::lion:
      (is_8bit ? kernels().lion8bit_step : kernels().lion_step)(
          tensor, LionRule(numbers, grad_scale), rounding, begin, end);
      return;
  }
}

class CpuBackend final : public Backend {
 public:
  const char* name() const override { return "CPU"; }

  void nf4_quantize(const TensorView& w, const NF4Weight& weight,
                    const ExecutionContext& context) const override {
    const NF4Bytes out = bytes_of(weight);
    const std::int64_t block_count = out.block_count();
    const std::int64_t group_count = nf4_nested_block_count(block_count);
    const std::int64_t grain = grain_for(nf4_blocks_per_nested_block * out.block_size);
    // Not filled with zeros first: for a large weight that is a pass over fresh pages on one thread.
    const auto absmax =
        std::make_unique_for_overwrite<float[]>(static_cast<std::size_t>(block_count));
    const auto group_sums =
        std::make_unique_for_overwrite<double[]>(static_cast<std::size_t>(group_count));

    std::atomic<std::int64_t> first_bad_block{block_count};
    parallel_for(context.num_threads, group_count, grain,
                 [&](std::int64_t begin, std::int64_t end) {
                   const std::int64_t bad =
                       kernels().nf4_quantize(w, out, absmax.get(), group_sums.get(), begin, end);
                   if (bad < 0) return;
                   std::int64_t known = first_bad_block;
                   while (bad < known && !first_bad_block.compare_exchange_weak(known, bad)) {
                   }
                 });
    if (first_bad_block != block_count) throw_not_finite(first_bad_block, weight);

    if (!out.is_nested()) {
      std::copy_n(reinterpret_cast<const std::uint8_t*>(absmax.get()), 4 * block_count, out.absmax);
      return;
    }
    const double sum = std::accumulate(group_sums.get(), group_sums.get() + group_count, 0.0);
    const float offset =
        block_count > 0 ? static_cast<float>(sum / static_cast<double>(block_count)) : 0.0f;
    store_float(out.nested_offset, 0, offset);
    parallel_for(context.num_threads, group_count, grain_for(nf4_blocks_per_nested_block),
                 [&](std::int64_t begin, std::int64_t end) {
                   kernels().nf4_quantize_scales(absmax.get(), offset, out, begin, end);
                 });
  }

  void nf4_dequantize(const NF4Weight& weight, const TensorView& out,
                      const ExecutionContext& context) const override {
    const NF4Bytes bytes = bytes_of(weight);
    parallel_for(context.num_threads, bytes.block_count(), grain_for(bytes.block_size),
                 [&](std::int64_t begin, std::int64_t end) {
                   kernels().nf4_dequantize(bytes, out, begin, end);
                 });
  }

  void nf4_dequantize_absmax(const NF4Weight& weight, const TensorView& out,
                             const ExecutionContext& context) const override {
    const NF4Bytes bytes = bytes_of(weight);
    parallel_for(context.num_threads, bytes.block_count(), grain_for(1),
                 [&](std::int64_t begin, std::int64_t end) {
                   for (std::int64_t b = begin; b < end; ++b) out.as<float>()[b] = bytes.scale(b);
                 });
  }

  void nf4_linear(const TensorView& x, const NF4Weight& weight, const TensorView& bias,
                  const TensorView& y, const ExecutionContext& context) const override {
    kernels().nf4_linear(x, bytes_of(weight), bias, y, context.num_threads);
  }

  void nf4_linear_grad_input(const TensorView& dy, const NF4Weight& weight, const TensorView& dx,
                             const ExecutionContext& context) const override {
    kernels().nf4_linear_grad_input(dy, bytes_of(weight), dx, context.num_threads);
  }

  void lora_forward(const LoRAForward& arguments, const ExecutionContext& context) const override {
    kernels().lora_forward(arguments, context.num_threads);
  }

  void lora_backward(const LoRABackward& arguments,
                     const ExecutionContext& context) const override {
    kernels().lora_backward(arguments, context.num_threads);
  }

  void lora_forward_grouped(const LoRAForwardGrouped& arguments,
                            const ExecutionContext& context) const override {
    run_lora_forward_grouped(arguments, context.num_threads);
  }

  void lora_backward_grouped(const LoRABackwardGrouped& arguments,
                             const ExecutionContext& context) const override {
    run_lora_backward_grouped(arguments, context.num_threads);
  }

  void dora_scale(const DoRAScale& arguments, const ExecutionContext& context) const override {
    parallel_for(
        context.num_threads, arguments.y.shape[1], columns_for(arguments.y.shape[0]),
        [&](std::int64_t begin, std::int64_t end) { kernels().dora_scale(arguments, begin, end); });
  }

  void dora_scale_backward(const DoRAScaleBackward& arguments,
                           const ExecutionContext& context) const override {
    parallel_for(context.num_threads, arguments.dy.shape[1], columns_for(arguments.dy.shape[0]),
                 [&](std::int64_t begin, std::int64_t end) {
                   kernels().dora_scale_backward(arguments, begin, end);
                 });
  }

  void dropout(const TensorView& x, double p, const TensorView& seed, const TensorView& out,
               const ExecutionContext& context) const override {
    const std::int64_t seed_value = *seed.as<const std::int64_t>();
    parallel_for(context.num_threads, x.numel(), elements_per_grain,
                 [&](std::int64_t begin, std::int64_t end) {
                   kernels().dropout(x, p, seed_value, out, begin, end);
                 });
  }

  void optimizer_step(OptimizerRule rule, std::span<const OptimizerTensor> tensors,
                      const OptimizerStep& step, const ExecutionContext& context) const override {
    if (is_skipped(step)) return;
    for_each_piece(tensors, elements_per_grain, context,
                   [&](const OptimizerTensor& tensor, std::int64_t begin, std::int64_t end) {
                     step_piece(rule, tensor, step, begin, end);
                   });
    for (const OptimizerTensor& tensor : tensors) {
      if (tensor.step_count.is_present && tensor.counts_step) {
        *tensor.step_count.as<float>() += 1.0f;
      }
    }
  }

  std::function<void()> prepare_paged_optimizer_step(
      PagedState& state, std::span<const PagedTensor> tensors, const OptimizerStep& step,
      const ExecutionContext& context) const override {
    return [this, &state, tensors, step, context] {
      if (is_skipped(step)) return;
      walk_pages(state, tensors, context.stream, [&](std::span<const OptimizerTensor> pieces) {
        optimizer_step(state.rule(), pieces, step, context);
      });
    };
  }

  std::unique_ptr<PagedBuffer> make_paged_buffer(Device device,
                                                 const PagedBufferOptions& options) const override {
    return make_cpu_paged_buffer(device, options);
  }

 private:
  /// Columns of a matrix of `rows` rows that make a grain: whole cache lines of each row.
  static std::int64_t columns_for(std::int64_t rows) {
    return ceil_divide(grain_for(rows), 64) * 64;
  }

  /// Cuts a list of parameters of any sizes into pieces of `piece` elements, for one parallel_for
  /// over all of them.
  template <typename Function>
  static void for_each_piece(std::span<const OptimizerTensor> tensors, std::int64_t piece,
                             const ExecutionContext& context, Function&& function) {
    std::vector<std::int64_t> first_piece{0};  // of each tensor, and the total
    for (const OptimizerTensor& tensor : tensors) {
      first_piece.push_back(first_piece.back() + ceil_divide(tensor.param.numel(), piece));
    }
    parallel_for(
        context.num_threads, first_piece.back(), 1, [&](std::int64_t begin, std::int64_t end) {
          auto next = std::upper_bound(first_piece.begin(), first_piece.end(), begin);
          for (std::int64_t i = begin; i < end; ++i) {
            while (*next <= i) ++next;
            const auto index = static_cast<std::size_t>(next - first_piece.begin() - 1);
            const std::int64_t first = (i - first_piece[index]) * piece;
            function(tensors[index], first, std::min(first + piece, tensors[index].param.numel()));
          }
        });
  }
};

}  // namespace

const Backend& cpu_backend() {
  static const CpuBackend backend;
  return backend;
}

CpuInfo cpu_info() {
  CpuInfo info{.sets = {}, .active_set = kernels().name};
  for (const CpuKernels* set : attainable_kernels()) info.sets.emplace_back(set->name);
  return info;
}

}  // namespace qlora
