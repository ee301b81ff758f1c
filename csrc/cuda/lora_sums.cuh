// Where the sums of LoRA's products go: t, u and the factors' gradients; and the kernel that adds
// their parts.
#pragma once

#include <bit>

#include "core/tensor_view.h"
#include "cuda/lora_factor.cuh"

namespace qlora::cuda {

/// A product [rows, ranks]. Each sum is scaled, rounded once to `dtype` and stored at
/// out[row * row_stride + rank * rank_stride].
///
/// A sum that is split over thread blocks is stored first as fp32 partial sums
/// [parts, rows, padded_ranks].
struct LoRASums {
  void* out;
  DType dtype;
  std::int64_t row_stride, rank_stride;
  std::int64_t rows, ranks;
  float scale;
  float* partials;  // null for one part
  std::int64_t parts;
  std::int64_t padded_ranks;  // a multiple of 16
};

struct alignas(8) FloatPair {
  float first, second;
};

__device__ inline void store_sum(const LoRASums& sums, std::int64_t row, std::int64_t rank,
                                 float sum) {
  if (row >= sums.rows || rank >= sums.ranks) return;
  const std::int64_t i = row * sums.row_stride + rank * sums.rank_stride;
  const float value = sums.scale * sum;
  switch (sums.dtype) {
    case DType::bfloat16:
      static_cast<BFloat16*>(sums.out)[i] = low_half<BFloat16>(round_pair<BFloat16>(value, 0.0f));
      break;
    case DType::float16:
      static_cast<Float16*>(sums.out)[i] = low_half<Float16>(round_pair<Float16>(value, 0.0f));
      break;
    default: static_cast<float*>(sums.out)[i] = value;
  }
}

/// The sums of an even rank and the next, of one part. Ranks up to padded_ranks are passed.
__device__ inline void store_sums(const LoRASums& sums, std::int64_t part, std::int64_t row,
                                  std::int64_t rank, float first, float second) {
  if (sums.partials == nullptr) {
    store_sum(sums, row, rank, first);
    store_sum(sums, row, rank + 1, second);
  } else if (row < sums.rows) {
    float* const to = sums.partials + (part * sums.rows + row) * sums.padded_ranks + rank;
    *reinterpret_cast<FloatPair*>(to) = {first, second};
  }
}

/// One or two products whose parts are to be added.
struct LoRAAddPartsArguments {
  LoRASums sums[2];
  std::int64_t first_items;  // of sums[0]; the rest are of sums[1]
  std::int64_t items;        // an item is 4 ranks of a row
};

inline constexpr int lora_add_parts_threads = 256;

/// out = round(scale * (part 0 + part 1 + ...)), in this order.
///
///   a thread owns 4 ranks of a row; reads 4 B a sum and part, from L2
static __global__ void __launch_bounds__(lora_add_parts_threads)
    lora_add_parts_kernel(const LoRAAddPartsArguments a) {
  const std::int64_t stride = std::int64_t{gridDim.x} * lora_add_parts_threads;
  for (std::int64_t i = std::int64_t{blockIdx.x} * lora_add_parts_threads + threadIdx.x;
       i < a.items; i += stride) {
    const bool is_first = i < a.first_items;
    const LoRASums& sums = a.sums[is_first ? 0 : 1];
    const std::int64_t item = is_first ? i : i - a.first_items;
    // Neighbouring threads take neighbours in `out`.
    const std::int64_t chunks = sums.padded_ranks / 4;
    const bool are_ranks_neighbours = sums.rank_stride == 1;
    const std::int64_t row = are_ranks_neighbours ? item / chunks : item % sums.rows;
    const std::int64_t rank = 4 * (are_ranks_neighbours ? item % chunks : item / sums.rows);
    const float* from = sums.partials + row * sums.padded_ranks + rank;
    float total[4] = {};
#pragma unroll 4
    for (std::int64_t part = 0; part < sums.parts; ++part) {
      const Bytes16 values = load_16_bytes(from);
      from += sums.rows * sums.padded_ranks;
#pragma unroll
      for (int j = 0; j < 4; ++j) total[j] += std::bit_cast<float>(values.words[j]);
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) store_sum(sums, row, rank + j, total[j]);
  }
}

}  // namespace qlora::cuda
