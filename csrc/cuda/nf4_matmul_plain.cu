// Picks the plain kernel for a product with an NF4 weight and queues it.
#include "cuda/nf4_matmul_plain.h"

#include "cuda/launch.cuh"
#include "cuda/nf4_matmul_plain.cuh"

namespace qlora::cuda {
namespace {

// Enough to fill any GPU many times over; what is beyond it goes round the kernel's loop.
constexpr std::int64_t max_plain_thread_blocks = 65535;

template <typename T>
void launch_plain(const NF4Matmul& matmul, cudaStream_t stream) {
  const NF4Weight& weight = matmul.weight;
  const bool is_forward = matmul.direction == Direction::forward;
  const NF4PlainArguments<T> arguments{
      .input = matmul.input.as<const T>(),
      .codes = weight.codes.as<const std::uint8_t>(),
      .scales = scales_of(weight),
      .bias = matmul.bias.is_present ? matmul.bias.as<const T>() : nullptr,
      .output = matmul.output.as<T>(),
      .m = matmul.m(),
      .columns = matmul.columns(),
      .terms = matmul.reduced(),
      .term_stride = is_forward ? 1 : weight.k,
      .column_stride = is_forward ? weight.k : 1,
      .block_size_log2 = std::countr_zero(static_cast<std::uint64_t>(weight.block_size))};
  const std::int64_t tiles =
      ceil_divide(arguments.columns, plain_columns) * ceil_divide(arguments.m, plain_tokens);
  launch(is_forward ? "nf4_linear, plain" : "nf4_linear_grad_input, plain",
         weight.is_nested() ? nf4_matmul_plain_kernel<T, true> : nf4_matmul_plain_kernel<T, false>,
         {static_cast<unsigned>(std::min(tiles, max_plain_thread_blocks)), plain_threads,
          plain_shared_bytes},
         stream, arguments);
}

}  // namespace

void launch_nf4_matmul_plain(const NF4Matmul& matmul, cudaStream_t stream) {
  with_float_type(matmul.input.dtype, [&]<typename T>(T) { launch_plain<T>(matmul, stream); });
}

}  // namespace qlora::cuda
