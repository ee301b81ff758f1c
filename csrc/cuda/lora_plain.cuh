// LoRA's kernels for what the tensor cores do not take: fp32, rows that are no whole chunks, any
// alignment, any rank. Simple, and correct for everything.
#pragma once

#include "cuda/lora_factor.cuh"
#include "cuda/lora_sums.cuh"

namespace qlora::cuda {

inline constexpr int lora_plain_threads = 256;

template <typename T>
struct LoRAPlainShrinkArguments {
  const T* wide;  // [rows, columns]
  std::int64_t columns;
  LoRAFactor factor;
  bool are_ranks_columns;  // of the factor
  LoRASums sums;           // [rows, ranks]
};

/// lora_shrink_kernel's formula. A warp owns a sum; its lanes take every 32nd column.
template <typename T>
__global__ void __launch_bounds__(lora_plain_threads)
    lora_plain_shrink_kernel(const LoRAPlainShrinkArguments<T> a) {
  constexpr int warps = lora_plain_threads / lanes_per_warp;
  const int lane = static_cast<int>(threadIdx.x % lanes_per_warp);
  const int warp = warp_index(static_cast<int>(threadIdx.x));
  const std::int64_t row_stride = a.are_ranks_columns ? 1 : a.columns;
  const std::int64_t column_stride = a.are_ranks_columns ? a.sums.ranks : 1;
  for (std::int64_t item = std::int64_t{blockIdx.x} * warps + warp;
       item < a.sums.rows * a.sums.ranks; item += std::int64_t{gridDim.x} * warps) {
    const std::int64_t row = item / a.sums.ranks, rank = item % a.sums.ranks;
    float sum = 0.0f;
    for (std::int64_t c = lane; c < a.columns; c += lanes_per_warp) {
      sum += to_float(a.wide[row * a.columns + c]) *
             load_factor_element<T>(a.factor, rank * row_stride + c * column_stride);
    }
#pragma unroll
    for (int distance = lanes_per_warp / 2; distance > 0; distance /= 2) {
      sum += __shfl_xor_sync(all_lanes, sum, distance);
    }
    if (lane == 0) store_sum(a.sums, row, rank, sum);
  }
}

template <typename T>
struct LoRAPlainGradientArguments {
  const T* wide;    // [tokens, columns]
  const T* narrow;  // [tokens, ranks]
  std::int64_t tokens;
  LoRASums sums;  // [columns, ranks]
};

/// lora_gradients_kernel's formula, for one gradient. A thread owns a sum, neighbours have
/// neighbouring columns.
template <typename T>
__global__ void __launch_bounds__(lora_plain_threads)
    lora_plain_gradient_kernel(const LoRAPlainGradientArguments<T> a) {
  const std::int64_t columns = a.sums.rows, ranks = a.sums.ranks;
  for (std::int64_t item = std::int64_t{blockIdx.x} * lora_plain_threads + threadIdx.x;
       item < columns * ranks; item += std::int64_t{gridDim.x} * lora_plain_threads) {
    const std::int64_t rank = item / columns, c = item % columns;
    float sum = 0.0f;
#pragma unroll 4
    for (std::int64_t i = 0; i < a.tokens; ++i) {
      sum += to_float(a.wide[i * columns + c]) * to_float(a.narrow[i * ranks + rank]);
    }
    store_sum(a.sums, c, rank, sum);
  }
}

template <typename T>
struct LoRAPlainExpandArguments {
  const T* narrow;  // [tokens, ranks]
  LoRAFactor factor;
  bool are_ranks_columns;  // of the factor
  T* wide;                 // [tokens, columns]
  std::int64_t tokens, columns, ranks;
  float scale;
};

/// lora_expand_kernel's formula. A thread owns an element of `wide`.
template <typename T>
__global__ void __launch_bounds__(lora_plain_threads)
    lora_plain_expand_kernel(const LoRAPlainExpandArguments<T> a) {
  const std::int64_t rank_stride = a.are_ranks_columns ? 1 : a.columns;
  const std::int64_t column_stride = a.are_ranks_columns ? a.ranks : 1;
  for (std::int64_t item = std::int64_t{blockIdx.x} * lora_plain_threads + threadIdx.x;
       item < a.tokens * a.columns; item += std::int64_t{gridDim.x} * lora_plain_threads) {
    const std::int64_t token = item / a.columns, c = item % a.columns;
    float sum = 0.0f;
    for (std::int64_t rank = 0; rank < a.ranks; ++rank) {
      sum += to_float(a.narrow[token * a.ranks + rank]) *
             load_factor_element<T>(a.factor, rank * rank_stride + c * column_stride);
    }
    a.wide[item] = from_float<T>(to_float(a.wide[item]) + a.scale * sum);
  }
}

}  // namespace qlora::cuda
