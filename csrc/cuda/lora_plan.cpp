#include "cuda/lora_plan.h"

#include <algorithm>

#include "format/nf4_layout.h"

namespace qlora::cuda {
namespace {

// Two for each of an H200's 132 SMs, which then have 64 KB on their way each; and at least one for
// each of a B200's 148. Partial sums are r * 4 bytes a row and part, written and read through L2.
constexpr std::int64_t wanted_summing_blocks = 264;

// Filling the pipeline takes the time of some two steps; a part should be longer than that.
constexpr std::int64_t min_steps_per_part = 4;

// Eight for each SM of an H200, of which three run at a time: the last ones to finish cost little.
constexpr std::int64_t wanted_expand_blocks = 1056;

// The factor's tile in shared memory is 128 columns * 2 bytes a rank: 64 KB, which every GPU has
// (99 KB on compute capability 8.6, 8.9 and 12.0).
constexpr std::int64_t max_expand_rank = 256;

/// Whether the rows of a matrix are whole chunks at multiples of 16 bytes, of a type that the
/// tensor cores take without rounding.
bool has_chunks(const TensorView& wide) {
  if (wide.dtype != DType::bfloat16 && wide.dtype != DType::float16) return false;
  return wide.shape[1] % 8 == 0 && reinterpret_cast<std::uintptr_t>(wide.data) % 16 == 0;
}

}  // namespace

LoRAKernel choose_lora_sum_kernel(const TensorView& wide) {
  return has_chunks(wide) ? LoRAKernel::tensor_cores : LoRAKernel::plain;
}

LoRAKernel choose_lora_expand_kernel(const TensorView& wide, std::int64_t r) {
  return has_chunks(wide) && r <= max_expand_rank ? LoRAKernel::tensor_cores : LoRAKernel::plain;
}

LoRASplit plan_lora_split(std::int64_t tiles, std::int64_t steps) {
  const std::int64_t wanted = wanted_summing_blocks / std::max<std::int64_t>(tiles, 1);
  const std::int64_t most = steps / min_steps_per_part;
  const std::int64_t parts = std::max<std::int64_t>(std::min(wanted, most), 1);
  const std::int64_t steps_per_part = std::max<std::int64_t>(ceil_divide(steps, parts), 1);
  // Rounding up may leave the last parts without a step.
  return {std::max<std::int64_t>(ceil_divide(steps, steps_per_part), 1), steps_per_part};
}

std::int64_t plan_lora_token_groups(std::int64_t token_tiles, std::int64_t column_tiles) {
  const std::int64_t wanted = wanted_expand_blocks / std::max<std::int64_t>(column_tiles, 1);
  return std::clamp<std::int64_t>(wanted, 1, std::max<std::int64_t>(token_tiles, 1));
}

}  // namespace qlora::cuda
