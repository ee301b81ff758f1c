// Picks LoRA's kernels and queues them.
#include "cuda/lora.h"

#include <algorithm>
#include <optional>

#include "cuda/launch.cuh"
#include "cuda/lora_expand.cuh"
#include "cuda/lora_gradients.cuh"
#include "cuda/lora_plain.cuh"
#include "cuda/lora_plan.h"
#include "cuda/lora_shrink.cuh"
#include "cuda/nf4_codec_map.h"

namespace qlora::cuda {
namespace {

/// with_float_type for the types of the tensor cores, which lora_plan.h has asked for.
template <typename Function>
void with_16_bit_type(DType dtype, Function&& function) {
  if (dtype == DType::bfloat16) {
    function(BFloat16{});
  } else if (dtype == DType::float16) {
    function(Float16{});
  } else {
    throw_no_float_kernel(dtype);
  }
}

bool is_aligned(const void* address, std::size_t bytes) {
  return reinterpret_cast<std::uintptr_t>(address) % bytes == 0;
}

LoRAFactor factor_of(const TensorView& factor) {
  const std::int64_t elements_per_access = factor.dtype == DType::float32 ? 4 : 8;
  return {.data = factor.data,
          .dtype = factor.dtype,
          .rows = factor.shape[0],
          .columns = factor.shape[1],
          .has_aligned_chunks =
              is_aligned(factor.data, 16) && factor.shape[1] % elements_per_access == 0};
}

std::int64_t rank_tiles(std::int64_t r) { return ceil_divide(r, lora_ranks_per_tile); }

std::int64_t lora_tiles(std::int64_t rows, std::int64_t ranks) {
  return ceil_divide(rows, lora_tile) * rank_tiles(ranks);
}

/// A product [rows, ranks] over the wide matrix: t, u or a factor's gradient.
struct PlannedSums {
  LoRAKernel kernel;
  std::int64_t rows, ranks, steps;
  LoRASplit split = {.parts = 1, .steps_per_part = 0};

  /// `other_tiles`: of products that run at the same time.
  PlannedSums(const TensorView& wide, std::int64_t row_count, std::int64_t rank_count,
              std::int64_t sum_length, std::int64_t other_tiles)
      : kernel(choose_lora_sum_kernel(wide)),
        rows(row_count),
        ranks(rank_count),
        steps(ceil_divide(sum_length, lora_step)) {
    if (kernel == LoRAKernel::tensor_cores) {
      split = plan_lora_split(lora_tiles(rows, ranks) + other_tiles, steps);
    }
  }

  bool is_empty() const { return rows == 0 || ranks == 0; }
  bool is_split() const { return split.parts > 1; }
  std::int64_t padded_ranks() const { return 16 * ceil_divide(ranks, 16); }
  std::size_t partial_bytes() const {
    return is_split() ? 4 * static_cast<std::size_t>(split.parts * rows * padded_ranks()) : 0;
  }
  unsigned thread_blocks() const {
    return static_cast<unsigned>(lora_tiles(rows, ranks) * split.parts);
  }

  /// Rank `rank` of row `row` goes to out[row * row_stride + rank * rank_stride].
  LoRASums to(const TensorView& out, std::int64_t row_stride, std::int64_t rank_stride, float scale,
              std::byte* partials) const {
    return {.out = out.data,
            .dtype = out.dtype,
            .row_stride = row_stride,
            .rank_stride = rank_stride,
            .rows = rows,
            .ranks = ranks,
            .scale = scale,
            .partials = is_split() ? reinterpret_cast<float*>(partials) : nullptr,
            .parts = split.parts,
            .padded_ranks = padded_ranks()};
  }
};

PlannedSums plan_shrink(const TensorView& wide, std::int64_t r) {
  return {wide, wide.shape[0], r, wide.shape[1], 0};
}

/// The gradients of both factors are taken in one launch.
PlannedSums plan_gradient(const TensorView& wide, std::int64_t r, const TensorView& other_wide) {
  return {wide, wide.shape[1], r, wide.shape[0], lora_tiles(other_wide.shape[1], r)};
}

/// Adds the parts of one or two products; one that was not split has none.
void launch_add_parts(const char* operation, const LoRASums& first, const LoRASums& second,
                      cudaStream_t stream) {
  const auto items = [](const LoRASums& sums) {
    return sums.partials == nullptr ? 0 : sums.rows * (sums.padded_ranks / 4);
  };
  const LoRAAddPartsArguments arguments{
      .sums = {first, second}, .first_items = items(first), .items = items(first) + items(second)};
  if (arguments.items == 0) return;
  launch(operation, lora_add_parts_kernel,
         {thread_blocks_for_items(arguments.items, lora_add_parts_threads), lora_add_parts_threads},
         stream, arguments);
}

/// out[m,r] = scale * wide · factorᵀ, or wide · factor where the factor has its ranks as columns.
void launch_shrink(const char* operation, const PlannedSums& plan, const TensorView& wide,
                   const TensorView& factor, bool are_ranks_columns, float scale,
                   const TensorView& out, std::byte* partials, cudaStream_t stream) {
  if (plan.is_empty()) return;
  const LoRASums sums = plan.to(out, plan.ranks, 1, scale, partials);
  if (plan.kernel == LoRAKernel::plain) {
    with_float_type(wide.dtype, [&]<typename T>(T) {
      const LoRAPlainShrinkArguments<T> arguments{.wide = wide.as<const T>(),
                                                  .columns = wide.shape[1],
                                                  .factor = factor_of(factor),
                                                  .are_ranks_columns = are_ranks_columns,
                                                  .sums = sums};
      launch(operation, lora_plain_shrink_kernel<T>,
             {thread_blocks_for_items(plan.rows * plan.ranks, lora_plain_threads / lanes_per_warp),
              lora_plain_threads},
             stream, arguments);
    });
    return;
  }
  with_16_bit_type(wide.dtype, [&]<typename T>(T) {
    const LoRAShrinkArguments<T> arguments{
        .wide = wide.as<const T>(),
        .rows = wide.shape[0],
        .columns = wide.shape[1],
        .factor = factor_of(factor),
        .rank_tiles = static_cast<unsigned>(rank_tiles(plan.ranks)),
        .steps = plan.steps,
        .steps_per_part = plan.split.steps_per_part,
        .sums = sums};
    launch(operation,
           are_ranks_columns ? lora_shrink_kernel<T, true> : lora_shrink_kernel<T, false>,
           {plan.thread_blocks(), lora_threads, lora_shrink_shared_bytes}, stream, arguments);
  });
  launch_add_parts(operation, sums, {}, stream);
}

/// wide[m, c] += scale * narrow[m,r] · factor[c,r]ᵀ, or · factor[r,c].
void launch_expand(const char* operation, const TensorView& narrow, const TensorView& factor,
                   bool are_ranks_columns, float scale, const TensorView& wide,
                   cudaStream_t stream) {
  const std::int64_t tokens = wide.shape[0], columns = wide.shape[1], ranks = narrow.shape[1];
  if (tokens == 0 || columns == 0) return;
  if (choose_lora_expand_kernel(wide, ranks) == LoRAKernel::plain) {
    with_float_type(wide.dtype, [&]<typename T>(T) {
      const LoRAPlainExpandArguments<T> arguments{.narrow = narrow.as<const T>(),
                                                  .factor = factor_of(factor),
                                                  .are_ranks_columns = are_ranks_columns,
                                                  .wide = wide.as<T>(),
                                                  .tokens = tokens,
                                                  .columns = columns,
                                                  .ranks = ranks,
                                                  .scale = scale};
      launch(operation, lora_plain_expand_kernel<T>,
             {thread_blocks_for_items(tokens * columns, lora_plain_threads), lora_plain_threads},
             stream, arguments);
    });
    return;
  }
  const std::int64_t token_tiles = ceil_divide(tokens, lora_expand_tokens);
  const std::int64_t column_tiles = ceil_divide(columns, lora_tile);
  const std::int64_t tiles_per_group =
      ceil_divide(token_tiles, plan_lora_token_groups(token_tiles, column_tiles));
  const std::int64_t groups = ceil_divide(token_tiles, tiles_per_group);
  const int shared_bytes = static_cast<int>(16 * ceil_divide(ranks, 16)) * lora_tile * 2;
  with_16_bit_type(wide.dtype, [&]<typename T>(T) {
    const LoRAExpandArguments<T> arguments{
        .narrow = narrow.as<const T>(),
        .factor = factor_of(factor),
        .are_ranks_columns = are_ranks_columns,
        .wide = wide.as<T>(),
        .tokens = tokens,
        .columns = columns,
        .ranks = ranks,
        .has_narrow_pairs = ranks % 2 == 0 && is_aligned(narrow.data, 4),
        .scale = scale,
        .column_tiles = static_cast<unsigned>(column_tiles),
        .token_tiles = token_tiles,
        .token_tiles_per_group = tiles_per_group};
    launch(operation, lora_expand_kernel<T>,
           {static_cast<unsigned>(groups * column_tiles), lora_threads, shared_bytes}, stream,
           arguments);
  });
}

/// A factor's gradient: sums = wideᵀ · narrow.
struct GradientProduct {
  const PlannedSums& plan;
  const TensorView& wide;
  const TensorView& narrow;
  LoRASums sums;

  bool is_for_tensor_cores() const {
    return !plan.is_empty() && plan.kernel == LoRAKernel::tensor_cores;
  }
};

template <typename T>
LoRAGradient<T> gradient_arguments(const GradientProduct& product) {
  const TensorView& narrow = product.narrow;
  return {.wide = product.wide.as<const T>(),
          .narrow = narrow.as<const T>(),
          .tokens = product.wide.shape[0],
          .columns = product.wide.shape[1],
          .has_narrow_chunks = narrow.shape[1] % 8 == 0 && is_aligned(narrow.data, 16),
          .rank_tiles = static_cast<unsigned>(rank_tiles(narrow.shape[1])),
          .steps = product.plan.steps,
          .steps_per_part = product.plan.split.steps_per_part,
          .sums = product.sums};
}

void launch_plain_gradient(const char* operation, const GradientProduct& product,
                           cudaStream_t stream) {
  if (product.plan.is_empty() || product.plan.kernel != LoRAKernel::plain) return;
  with_float_type(product.wide.dtype, [&]<typename T>(T) {
    const LoRAPlainGradientArguments<T> arguments{.wide = product.wide.as<const T>(),
                                                  .narrow = product.narrow.as<const T>(),
                                                  .tokens = product.wide.shape[0],
                                                  .sums = product.sums};
    launch(operation, lora_plain_gradient_kernel<T>,
           {thread_blocks_for_items(product.plan.rows * product.plan.ranks, lora_plain_threads),
            lora_plain_threads},
           stream, arguments);
  });
}

/// Both gradients: in one launch, where the tensor cores take both.
void launch_gradients(const char* operation, const GradientProduct& a, const GradientProduct& b,
                      cudaStream_t stream) {
  launch_plain_gradient(operation, a, stream);
  launch_plain_gradient(operation, b, stream);
  const unsigned blocks_of_a = a.is_for_tensor_cores() ? a.plan.thread_blocks() : 0;
  const unsigned blocks_of_b = b.is_for_tensor_cores() ? b.plan.thread_blocks() : 0;
  if (blocks_of_a + blocks_of_b == 0) return;
  with_16_bit_type(a.wide.dtype, [&]<typename T>(T) {
    const LoRAGradientsArguments<T> arguments{
        .gradients = {gradient_arguments<T>(a), gradient_arguments<T>(b)},
        .first_thread_blocks = blocks_of_a};
    launch(operation, lora_gradients_kernel<T>,
           {blocks_of_a + blocks_of_b, lora_threads, lora_gradients_shared_bytes}, stream,
           arguments);
  });
  launch_add_parts(operation, a.sums, b.sums, stream);
}

}  // namespace

void launch_lora_forward(const LoRAForward& arguments, cudaStream_t stream) {
  const char* const operation = "lora_forward";
  const auto& [x, lora_a, lora_b, scaling, t, y] = arguments;
  const PlannedSums plan = plan_shrink(x, lora_a.shape[0]);
  std::optional<StreamBuffer> partials;
  if (plan.partial_bytes() > 0) partials.emplace(plan.partial_bytes(), stream, operation);
  launch_shrink(operation, plan, x, lora_a, false, 1.0f, t, partials ? partials->data() : nullptr,
                stream);
  launch_expand(operation, t, lora_b, true, scaling, y, stream);
}

void launch_lora_backward(const LoRABackward& arguments, cudaStream_t stream) {
  const char* const operation = "lora_backward";
  const auto& [dy, x, t, lora_a, lora_b, scaling, grad_a, grad_b, dx] = arguments;
  const std::int64_t r = lora_a.shape[0], k = lora_a.shape[1];
  const PlannedSums u_plan = plan_shrink(dy, r);
  const PlannedSums a_plan = plan_gradient(x, r, dy), b_plan = plan_gradient(dy, r, x);

  // u, then the partial sums of u, whose memory those of the gradients use after it. (A chunk more,
  // so that an empty u is no empty allocation.)
  const std::size_t u_bytes = 16 * static_cast<std::size_t>(1 + ceil_divide(4 * t.numel(), 16));
  const std::size_t a_bytes = a_plan.partial_bytes();
  const StreamBuffer scratch(
      u_bytes + std::max(u_plan.partial_bytes(), a_bytes + b_plan.partial_bytes()), stream,
      operation);
  TensorView u = t;
  u.data = scratch.data();
  std::byte* const partials = scratch.data() + u_bytes;

  launch_shrink(operation, u_plan, dy, lora_b, true, scaling, u, partials, stream);
  launch_gradients(operation, {a_plan, x, u, a_plan.to(grad_a, 1, k, 1.0f, partials)},
                   {b_plan, dy, t, b_plan.to(grad_b, r, 1, scaling, partials + a_bytes)}, stream);
  if (dx.is_present) launch_expand(operation, u, lora_a, false, 1.0f, dx, stream);
}

}  // namespace qlora::cuda
