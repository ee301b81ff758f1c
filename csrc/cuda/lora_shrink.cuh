// The kernel that multiplies a wide matrix with a factor: t from x, u from dy.
#pragma once

#include <algorithm>

#include "cuda/lora_factor.cuh"
#include "cuda/lora_sums.cuh"
#include "cuda/lora_tile.cuh"

namespace qlora::cuda {

template <typename T>
struct LoRAShrinkArguments {
  const T* wide;  // [rows, columns]
  std::int64_t rows, columns;
  LoRAFactor factor;
  unsigned rank_tiles;
  std::int64_t steps, steps_per_part;
  LoRASums sums;  // [rows, ranks]
};

/// The factor's tile of a step: [ranks, 64], or [64, ranks] of a factor that has its ranks as
/// columns. A thread moves up to two chunks, and holds them while the step before is multiplied.
template <typename T, bool are_ranks_columns>
class LoRAFactorTile {
 public:
  __device__ LoRAFactorTile(const LoRAFactor& factor, std::int64_t first_rank, int rank_count)
      : factor_(factor), first_rank_(first_rank) {
    // A power of two, so that a chunk's row is found by a shift.
    rank_chunks_log2_ = rank_count > 32 ? 3 : rank_count > 16 ? 2 : 1;
  }

  __device__ void load(std::int64_t first_column) {
#pragma unroll
    for (int i = 0; i < chunks_per_thread; ++i) {
      const int own = own_chunk(i);
      if (!exists(own)) continue;
      const int in_chunk = lora_elements_per_chunk * chunk(own);
      chunks_[i] =
          are_ranks_columns
              ? load_factor_chunk(factor_, first_column + row(own), first_rank_ + in_chunk)
              : load_factor_chunk(factor_, first_rank_ + row(own), first_column + in_chunk);
    }
  }

  __device__ void store(const LoRATile<T, 8>& tile) const {
#pragma unroll
    for (int i = 0; i < chunks_per_thread; ++i) {
      const int own = own_chunk(i);
      if (!exists(own)) continue;
      tile.chunk(row(own), chunk(own))
          .template as<Bytes16>()
          .store(0, round_factor_chunk<T>(chunks_[i], factor_.dtype));
    }
  }

 private:
  static constexpr int chunks_per_thread =
      lora_ranks_per_tile * lora_step / lora_elements_per_chunk / lora_threads;
  static constexpr int step_chunks_log2 = 3;
  static_assert(lora_elements_per_chunk << step_chunks_log2 == lora_step);

  __device__ static int own_chunk(int i) {
    return i * lora_threads + static_cast<int>(threadIdx.x);
  }
  __device__ int chunks_per_row_log2() const {
    return are_ranks_columns ? rank_chunks_log2_ : step_chunks_log2;
  }
  __device__ bool exists(int own) const { return own < lora_step << rank_chunks_log2_; }
  __device__ int row(int own) const { return own >> chunks_per_row_log2(); }
  __device__ int chunk(int own) const { return own & ((1 << chunks_per_row_log2()) - 1); }

  const LoRAFactor& factor_;
  std::int64_t first_rank_;
  int rank_chunks_log2_;
  LoRAFactorChunk chunks_[chunks_per_thread];
};

/// sums[i, rank] = wide[i, :] · factor[rank, :], or factor[:, rank] if are_ranks_columns.
///
///   wide T [rows, columns]; factor any float dtype, rounded to T on its way into shared memory
///   a thread block owns 128 rows, up to 64 ranks and a part of the columns, a warp 16 of the rows
///   reads wide once for every 64 ranks, and from L2 the factor once for every 128 rows: at r = 16
///   and fp32, a quarter of the bytes of `wide`
///   shared memory: lora_shrink_shared_bytes
///   precondition: T is a 16-bit type; columns % 8 == 0; wide is aligned to 16 bytes
template <typename T, bool are_ranks_columns>
__global__ void __launch_bounds__(lora_threads, 2)
    lora_shrink_kernel(const LoRAShrinkArguments<T> a) {
  const int lane = static_cast<int>(threadIdx.x % lanes_per_warp);
  const int warp = warp_index(static_cast<int>(threadIdx.x));
  // Thread blocks that share rows are neighbours.
  const auto parts = static_cast<unsigned>(a.sums.parts);
  const unsigned part = blockIdx.x % parts;
  const unsigned rank_tile = blockIdx.x / parts % a.rank_tiles;
  const std::int64_t first_row = std::int64_t{blockIdx.x / parts / a.rank_tiles} * lora_tile;
  const std::int64_t first_rank = std::int64_t{rank_tile} * lora_ranks_per_tile;
  const int rank_count =
      static_cast<int>(std::min<std::int64_t>(a.sums.ranks - first_rank, lora_ranks_per_tile));
  const int rank_pairs = (rank_count + 15) / 16;
  const std::int64_t first_step = part * a.steps_per_part;
  const int steps = static_cast<int>(std::min(a.steps - first_step, a.steps_per_part));

  const auto wide_tile = [](int stage) {
    return LoRATile<T, 8>(dynamic_shared_memory<T>(stage * lora_tile_bytes));
  };
  const auto factor_tile = [](int buffer) {
    return LoRATile<T, 8>(
        dynamic_shared_memory<T>(lora_stages * lora_tile_bytes + buffer * lora_rank_tile_bytes));
  };
  const auto first_column = [&](int step) { return (first_step + step) * lora_step; };
  LoRATileCopy<T, lora_tile, 8> copies(a.wide, a.rows, a.columns, first_row, first_column(0));
  const auto copy_step = [&](int step) {
    if (step < steps) copies.copy(wide_tile(step % lora_stages));
    copies.move_right();
    commit_copies();
  };

#pragma unroll
  for (int step = 0; step < lora_stages - 1; ++step) copy_step(step);
  LoRAFactorTile<T, are_ranks_columns> factor(a.factor, first_rank, rank_count);
  if (steps > 0) factor.load(first_column(0));

  LoRAAccumulator sums;
  const bool has_rows = first_row + 16 * warp < a.rows;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    factor.store(factor_tile(step % 2));
    wait_for_copies<lora_stages - 2>();
    __syncthreads();  // both tiles are there, and all warps are done with the step before
    copy_step(step + lora_stages - 1);
    if (step + 1 < steps) factor.load(first_column(step + 1));
    __syncwarp();  // ldmatrix and mma want all lanes, also those with nothing to load
    if (!has_rows) continue;
    const LoRATile<T, 8> wide = wide_tile(step % lora_stages), ranks = factor_tile(step % 2);
#pragma unroll
    for (int i = 0; i < lora_step / 16; ++i) {
      std::uint32_t x[4];
      wide.load_down(x, 16 * warp, 2 * i, lane);
#pragma unroll
      for (int pair = 0; pair < lora_rank_pairs; ++pair) {
        if (pair >= rank_pairs) continue;
        std::uint32_t b[4];
        if constexpr (are_ranks_columns) {
          ranks.load_down_transposed(b, 16 * i, 2 * pair, lane);
        } else {
          ranks.load_across(b, 16 * pair, 2 * i, lane);
        }
        sums.add<T>(pair, x, b);
      }
    }
  }

  const std::int64_t row = first_row + 16 * warp + lane / 4;
#pragma unroll
  for (int j = 0; j < 2 * lora_rank_pairs; ++j) {
    if (j >= 2 * rank_pairs) continue;
    const std::int64_t rank = first_rank + 8 * j + 2 * (lane % 4);
    store_sums(a.sums, part, row, rank, sums.ranks[j][0], sums.ranks[j][1]);
    store_sums(a.sums, part, row + 8, rank, sums.ranks[j][2], sums.ranks[j][3]);
  }
}

}  // namespace qlora::cuda
