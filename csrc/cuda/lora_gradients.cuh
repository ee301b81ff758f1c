// The kernel of the factors' gradients: products over the tokens.
#pragma once

#include <algorithm>

#include "cuda/lora_factor.cuh"
#include "cuda/lora_sums.cuh"
#include "cuda/lora_tile.cuh"

namespace qlora::cuda {

/// The gradient of one factor: of lora_a from x and u, of lora_b from dy and t.
template <typename T>
struct LoRAGradient {
  const T* wide;    // [tokens, columns]
  const T* narrow;  // [tokens, ranks]
  std::int64_t tokens, columns;
  bool has_narrow_chunks;  // ranks % 8 == 0, and narrow is aligned to 16 bytes
  unsigned rank_tiles;
  std::int64_t steps, steps_per_part;
  LoRASums sums;  // [columns, ranks]
};

/// One or two gradients that are taken in one launch.
template <typename T>
struct LoRAGradientsArguments {
  LoRAGradient<T> gradients[2];
  unsigned first_thread_blocks;  // of gradients[0]; the rest are of gradients[1]
};

/// Ranks `first_rank` and up of 64 tokens of `narrow`, zeros for what is outside of it: for rows
/// that are no whole chunks.
template <typename T>
__device__ void store_narrow_tile(const LoRATile<T, 8>& tile, const LoRAGradient<T>& a,
                                  std::int64_t first_token, std::int64_t first_rank, int chunks) {
  const int chunk = static_cast<int>(threadIdx.x) % 8;
  if (chunk >= chunks) return;
#pragma unroll 1
  for (int row = static_cast<int>(threadIdx.x) / 8; row < lora_step; row += lora_threads / 8) {
    const std::int64_t token = first_token + row;
    const std::int64_t rank = first_rank + lora_elements_per_chunk * chunk;
    Bytes16 values{};
#pragma unroll
    for (int i = 0; i < lora_elements_per_chunk; ++i) {
      if (token < a.tokens && rank + i < a.sums.ranks) {
        const std::uint32_t bits = a.narrow[token * a.sums.ranks + rank + i].bits;
        values.words[i / 2] |= bits << 16 * (i % 2);
      }
    }
    tile.chunk(row, chunk).template as<Bytes16>().store(0, values);
  }
}

/// sums[c, rank] = wide[:, c] · narrow[:, rank].
///
///   wide T [tokens, columns], narrow T [tokens, ranks]
///   a thread block owns 128 columns, up to 64 ranks and a part of the tokens, a warp 16 of the
///   columns
///   reads wide once for every 64 ranks, and from L2 narrow once for every 128 columns
///   shared memory: lora_gradients_shared_bytes
///   precondition: T is a 16-bit type; columns % 8 == 0; wide is aligned to 16 bytes
template <typename T>
__global__ void __launch_bounds__(lora_threads, 2)
    lora_gradients_kernel(const LoRAGradientsArguments<T> arguments) {
  const int lane = static_cast<int>(threadIdx.x % lanes_per_warp);
  const int warp = static_cast<int>(threadIdx.x / lanes_per_warp);
  const bool is_first = blockIdx.x < arguments.first_thread_blocks;
  const LoRAGradient<T>& a = arguments.gradients[is_first ? 0 : 1];
  const unsigned block = is_first ? blockIdx.x : blockIdx.x - arguments.first_thread_blocks;
  const auto parts = static_cast<unsigned>(a.sums.parts);
  const unsigned rank_tile = block % a.rank_tiles;
  const unsigned part = block / a.rank_tiles % parts;
  const std::int64_t first_column = std::int64_t{block / a.rank_tiles / parts} * lora_tile;
  const std::int64_t first_rank = std::int64_t{rank_tile} * lora_ranks_per_tile;
  const int rank_count =
      static_cast<int>(std::min<std::int64_t>(a.sums.ranks - first_rank, lora_ranks_per_tile));
  const int rank_pairs = (rank_count + 15) / 16;
  const std::int64_t first_step = part * a.steps_per_part;
  const int steps = static_cast<int>(std::min(a.steps - first_step, a.steps_per_part));

  const auto wide_tile = [](int stage) {
    return LoRATile<T, 16>(dynamic_shared_memory<T>(stage * lora_tile_bytes));
  };
  const auto narrow_tile = [](int stage) {
    return LoRATile<T, 8>(
        dynamic_shared_memory<T>(lora_stages * lora_tile_bytes + stage * lora_rank_tile_bytes));
  };
  const std::int64_t first_token = first_step * lora_step;
  LoRATileCopy<T, lora_step, 16> wide_copies(a.wide, a.tokens, a.columns, first_token,
                                             first_column);
  LoRATileCopy<T, lora_step, 8> narrow_copies(a.narrow, a.tokens, a.sums.ranks, first_token,
                                              first_rank);
  const auto copy_step = [&](int step) {
    if (step < steps) {
      wide_copies.copy(wide_tile(step % lora_stages));
      if (a.has_narrow_chunks) {
        narrow_copies.copy(narrow_tile(step % lora_stages), 2 * rank_pairs);
      } else {
        store_narrow_tile(narrow_tile(step % lora_stages), a, first_token + step * lora_step,
                          first_rank, 2 * rank_pairs);
      }
    }
    wide_copies.move_down();
    narrow_copies.move_down();
    commit_copies();
  };

#pragma unroll
  for (int step = 0; step < lora_stages - 1; ++step) copy_step(step);

  LoRAAccumulator sums;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    wait_for_copies<lora_stages - 2>();
    __syncthreads();  // both tiles are there, and all warps are done with the step before
    copy_step(step + lora_stages - 1);
    __syncwarp();  // ldmatrix and mma want all lanes, also those with nothing to copy
    const int stage = step % lora_stages;
    const LoRATile<T, 16> wide = wide_tile(stage);
    const LoRATile<T, 8> narrow = narrow_tile(stage);
#pragma unroll
    for (int i = 0; i < lora_step / 16; ++i) {
      std::uint32_t columns[4];
      wide.load_across_transposed(columns, 16 * i, 2 * warp, lane);
#pragma unroll
      for (int pair = 0; pair < lora_rank_pairs; ++pair) {
        if (pair >= rank_pairs) continue;
        std::uint32_t b[4];
        narrow.load_down_transposed(b, 16 * i, 2 * pair, lane);
        sums.add<T>(pair, columns, b);
      }
    }
  }

  const std::int64_t column = first_column + 16 * warp + lane / 4;
#pragma unroll
  for (int j = 0; j < 2 * lora_rank_pairs; ++j) {
    if (j >= 2 * rank_pairs) continue;
    const std::int64_t rank = first_rank + 8 * j + 2 * (lane % 4);
    store_sums(a.sums, part, column, rank, sums.ranks[j][0], sums.ranks[j][1]);
    store_sums(a.sums, part, column + 8, rank, sums.ranks[j][2], sums.ranks[j][3]);
  }
}

}  // namespace qlora::cuda
