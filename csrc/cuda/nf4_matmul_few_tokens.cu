// Picks the kernel for a few tokens and queues it.
#include "cuda/nf4_matmul_few_tokens.h"

#include <optional>

#include "cuda/launch.cuh"
#include "cuda/nf4_matmul_few_tokens_forward.cuh"
#include "cuda/nf4_matmul_few_tokens_grad_input.cuh"

namespace qlora::cuda {
namespace {

bool is_aligned(const void* address, std::size_t bytes) {
  return reinterpret_cast<std::uintptr_t>(address) % bytes == 0;
}

template <typename T>
using Kernel = void (*)(NF4FewTokensArguments<T>);

template <typename T>
Kernel<T> choose_kernel(Direction direction, int token_tiles) {
  const bool is_forward = direction == Direction::forward;
  switch (token_tiles) {
    case 1:
      return is_forward ? nf4_few_tokens_forward_kernel<T, 1>
                        : nf4_few_tokens_grad_input_kernel<T, 1>;
    case 2:
      return is_forward ? nf4_few_tokens_forward_kernel<T, 2>
                        : nf4_few_tokens_grad_input_kernel<T, 2>;
    case 4:
      return is_forward ? nf4_few_tokens_forward_kernel<T, 4>
                        : nf4_few_tokens_grad_input_kernel<T, 4>;
  }
  throw InvalidArgument(
      message(operation_of(direction), ": no kernel for ", token_tiles, " tiles of tokens"));
}

template <typename T>
void launch_few_tokens(const NF4Matmul& matmul, const FewTokensPlan& plan, cudaStream_t stream) {
  const bool is_forward = matmul.direction == Direction::forward;
  const char* const name =
      is_forward ? "nf4_linear, few tokens" : "nf4_linear_grad_input, few tokens";
  check(matmul.m() <= plan.token_tiles * tokens_per_mma, name, ": there are ", matmul.m(),
        " tokens, the plan has tiles for ", plan.token_tiles * tokens_per_mma);
  const NF4Weight& weight = matmul.weight;
  const std::int64_t count = matmul.m() * matmul.columns();
  std::optional<StreamBuffer> partials;
  if (plan.split > 1) {
    partials.emplace(static_cast<std::size_t>(plan.split * count) * sizeof(float), stream, name);
  }
  const T* const bias = matmul.bias.is_present ? matmul.bias.as<const T>() : nullptr;
  const int shared = columns_per_scale(matmul.direction, plan.token_tiles);
  const NF4FewTokensArguments<T> arguments{
      .input = matmul.input.as<const T>(),
      .codes = weight.codes.as<const std::uint8_t>(),
      .scales = scales_of(weight),
      .bias = bias,
      .output = matmul.output.as<T>(),
      .partials = partials ? reinterpret_cast<float*>(partials->data()) : nullptr,
      .m = static_cast<int>(matmul.m()),
      .n = static_cast<int>(weight.n),
      .k = static_cast<int>(weight.k),
      .split = plan.split,
      .chunks_per_block_log2 =
          std::countr_zero(static_cast<std::uint64_t>(weight.block_size)) - chunk_log2,
      .shares_scales = weight.block_size % shared == 0 && weight.k % shared == 0,
      .is_input_aligned = matmul.reduced() % grad_rows_per_lane == 0};
  launch(name, choose_kernel<T>(matmul.direction, plan.token_tiles),
         {static_cast<unsigned>(plan.thread_blocks), few_tokens_threads, plan.shared_bytes}, stream,
         arguments);
  if (!partials) return;
  constexpr std::int64_t max_sum_blocks = 1024;  // some waves of any GPU; the rest goes round
  launch(is_forward ? "nf4_linear, few tokens' sum" : "nf4_linear_grad_input, few tokens' sum",
         nf4_few_tokens_sum_kernel<T>,
         {static_cast<unsigned>(std::min(ceil_divide(count, few_tokens_threads), max_sum_blocks)),
          few_tokens_threads},
         stream, arguments.partials, bias, arguments.output, count,
         static_cast<int>(matmul.columns()), plan.split);
}

}  // namespace

bool nf4_matmul_few_tokens_supports(const NF4Matmul& matmul) {
  constexpr std::int64_t max_elements = std::int64_t{1} << 36;  // 32-bit numbers of chunks
  constexpr std::int64_t max_size = std::int64_t{1} << 26;      // 32 of these in 32 bits
  const NF4Weight& weight = matmul.weight;
  return matmul.input.dtype != DType::float32 && weight.k % forward_columns_per_lane == 0 &&
         weight.k <= max_size && weight.n <= max_size &&
         (weight.k == 0 || weight.n < max_elements / weight.k) &&
         is_aligned(matmul.input.data, 16) && is_aligned(weight.codes.data, 16);
}

void launch_nf4_matmul_few_tokens(const NF4Matmul& matmul, const FewTokensPlan& plan,
                                  cudaStream_t stream) {
  if (matmul.input.dtype == DType::bfloat16) {
    launch_few_tokens<BFloat16>(matmul, plan, stream);
  } else {
    launch_few_tokens<Float16>(matmul, plan, stream);
  }
}

}  // namespace qlora::cuda
