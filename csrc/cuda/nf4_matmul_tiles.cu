// Picks the kernel for the middle and queues it.
#include "cuda/nf4_matmul_tiles.h"

#include <bit>
#include <optional>

#include "cuda/launch.cuh"
#include "cuda/nf4_matmul_tiles.cuh"

namespace qlora::cuda {
namespace {

using tiles::Plan;

bool is_aligned(const TensorView& tensor, std::size_t bytes) {
  return reinterpret_cast<std::uintptr_t>(tensor.data) % bytes == 0;
}

template <typename T>
using Kernel = void (*)(tiles::Arguments<T>);

template <typename T>
Kernel<T> choose_kernel(Direction direction, int tokens) {
  const bool is_forward = direction == Direction::forward;
  switch (tokens) {
    case 64:
      return is_forward ? tiles::nf4_matmul_tiles_kernel<T, Direction::forward, 64>
                        : tiles::nf4_matmul_tiles_kernel<T, Direction::grad_input, 64>;
    case 128:
      return is_forward ? tiles::nf4_matmul_tiles_kernel<T, Direction::forward, 128>
                        : tiles::nf4_matmul_tiles_kernel<T, Direction::grad_input, 128>;
  }
  throw InvalidArgument(
      message(operation_of(direction), ": no kernel for tiles of ", tokens, " tokens"));
}

template <typename T>
void launch_tiles(const NF4Matmul& matmul, const Plan& plan, cudaStream_t stream) {
  const char* const operation = operation_of(matmul.direction);
  const NF4Weight& weight = matmul.weight;
  const std::int64_t padded_columns = plan.column_tiles * tiles::columns_per_tile;
  std::optional<StreamBuffer> partial_sums;
  if (plan.splits > 1) {
    partial_sums.emplace(static_cast<std::size_t>(4 * plan.splits * matmul.m() * padded_columns),
                         stream, operation);
  }
  const tiles::Arguments<T> arguments{
      .input = matmul.input.as<const T>(),
      .codes = weight.codes.as<const std::uint8_t>(),
      .scales = scales_of(weight),
      .bias = matmul.bias.is_present ? matmul.bias.as<const T>() : nullptr,
      .output = matmul.output.as<T>(),
      .partial_sums = partial_sums ? reinterpret_cast<float*>(partial_sums->data()) : nullptr,
      .m = matmul.m(),
      .n = weight.n,
      .k = weight.k,
      .columns = matmul.columns(),
      .padded_columns = padded_columns,
      .reduced = matmul.reduced(),
      .block_size_log2 = std::countr_zero(static_cast<std::uint64_t>(weight.block_size)),
      .token_tiles = static_cast<unsigned>(plan.token_tiles),
      .column_tiles = static_cast<unsigned>(plan.column_tiles),
      .stage_count = static_cast<int>(plan.stage_count),
      .stages_per_split = static_cast<int>(plan.stages_per_split),
      .is_output_aligned = is_aligned(matmul.output, 8) && matmul.columns() % 4 == 0};
  launch(operation, choose_kernel<T>(matmul.direction, plan.tokens),
         {static_cast<unsigned>(plan.thread_blocks()), tiles::thread_count,
          tiles::shared_bytes(plan.tokens)},
         stream, arguments);
  if (partial_sums) {
    const std::int64_t blocks_per_token =
        ceil_divide(matmul.columns(), tiles::columns_per_sum_block);
    launch(operation, tiles::nf4_matmul_tiles_sum_kernel<T>,
           {static_cast<unsigned>(matmul.m() * blocks_per_token), tiles::sum_thread_count}, stream,
           arguments, static_cast<int>(plan.splits), static_cast<unsigned>(blocks_per_token));
  }
}

}  // namespace

bool nf4_matmul_tiles_supports(const NF4Matmul& matmul, const DeviceTraits& device) {
  const NF4Weight& weight = matmul.weight;
  const DType dtype = matmul.input.dtype;
  return (dtype == DType::bfloat16 || dtype == DType::float16) && device.compute_capability >= 80 &&
         tiles::has_plan(matmul.m(), matmul.columns(), device) &&
         weight.k % tiles::weights_per_chunk == 0 && matmul.reduced() % 8 == 0 &&
         is_aligned(matmul.input, 16) && is_aligned(weight.codes, 16);
}

void launch_nf4_matmul_tiles(const NF4Matmul& matmul, const DeviceTraits& device,
                             cudaStream_t stream) {
  if (!nf4_matmul_tiles_supports(matmul, device)) {
    throw Unsupported(message(
        operation_of(matmul.direction), ": the tensor-core kernel for the middle does not take ",
        matmul.input.dtype, " [", matmul.m(), ", ", matmul.reduced(), "] with w [", matmul.weight.n,
        ", ", matmul.weight.k, "] on this device, or not at these addresses"));
  }
  launch_nf4_matmul_tiles(
      matmul, tiles::choose_plan(matmul.m(), matmul.columns(), matmul.reduced(), device), stream);
}

void launch_nf4_matmul_tiles(const NF4Matmul& matmul, const Plan& plan, cudaStream_t stream) {
  if (matmul.m() == 0 || matmul.columns() == 0) return;
  switch (matmul.input.dtype) {
    case DType::bfloat16: return launch_tiles<BFloat16>(matmul, plan, stream);
    case DType::float16: return launch_tiles<Float16>(matmul, plan, stream);
    default:
      throw Unsupported(message(operation_of(matmul.direction),
                                ": the tensor-core kernel for the middle takes bfloat16 and "
                                "float16, not ",
                                matmul.input.dtype));
  }
}

}  // namespace qlora::cuda
