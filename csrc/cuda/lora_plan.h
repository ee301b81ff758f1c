// How a LoRA product is done: by which kernel, and in how many parts. Pure C++, tested as a table.
#pragma once

#include <cstdint>

#include "core/tensor_view.h"

namespace qlora::cuda {

enum class LoRAKernel { tensor_cores, plain };

/// The kernel for shrink (t, u) and for a gradient of a factor. `wide` is the matrix with m rows
/// that is read: x or dy. Any rank will do.
LoRAKernel choose_lora_sum_kernel(const TensorView& wide);

/// The kernel for expand (y, dx): `wide` is what is added to.
LoRAKernel choose_lora_expand_kernel(const TensorView& wide, std::int64_t r);

/// How a long sum is split over thread blocks. Part p takes steps [p * steps_per_part, ...), up to
/// `steps` in all. With one part its thread block rounds and writes the result; more write fp32
/// partial sums, which a second kernel adds in the order of the parts.
struct LoRASplit {
  std::int64_t parts;
  std::int64_t steps_per_part;
};

/// `tiles`: thread blocks that there are without a split. `steps`: the steps of a sum.
///
/// The split does not ask for the device: the same shapes give the same bits on every one.
LoRASplit plan_lora_split(std::int64_t tiles, std::int64_t steps);

/// expand: groups of tokens, each of which rounds and holds its tile of the factor once.
std::int64_t plan_lora_token_groups(std::int64_t token_tiles, std::int64_t column_tiles);

}  // namespace qlora::cuda
