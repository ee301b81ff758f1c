// The kernel that multiplies a narrow matrix with a factor and adds it to a wide one: y from t, dx
// from u.
#pragma once

#include <algorithm>

#include "cuda/lora_factor.cuh"
#include "cuda/mma.cuh"

namespace qlora::cuda {

template <typename T>
struct LoRAExpandArguments {
  const T* narrow;  // [tokens, ranks]
  LoRAFactor factor;
  bool are_ranks_columns;  // of the factor
  T* wide;                 // [tokens, columns]
  std::int64_t tokens, columns, ranks;
  bool has_narrow_pairs;  // ranks % 2 == 0, and narrow is aligned to 4 bytes
  float scale;
  unsigned column_tiles;
  std::int64_t token_tiles, token_tiles_per_group;
};

/// Rounds 128 columns of the factor, all ranks, into shared memory; ranks from a.ranks up to
/// 8 * rank_chunks become zeros.
template <typename T>
__device__ void store_expand_tile(Shared<T> tile, const LoRAExpandArguments<T>& a,
                                  std::int64_t first_column, int rank_chunks) {
  const int thread = static_cast<int>(threadIdx.x);
  if (a.are_ranks_columns) {
    for (int own = thread; own < lora_tile * rank_chunks; own += lora_threads) {
      const int column = own % lora_tile, rank_chunk = own / lora_tile;
      const LoRAFactorChunk chunk =
          load_factor_chunk(a.factor, first_column + column, lora_elements_per_chunk * rank_chunk);
      tile.template as<Bytes16>().store(expand_chunk(column, rank_chunk),
                                        round_factor_chunk<T>(chunk, a.factor.dtype));
    }
    return;
  }
  constexpr int column_chunks = lora_tile / lora_elements_per_chunk;
  for (int own = thread; own < column_chunks * 8 * rank_chunks; own += lora_threads) {
    const int rank = own / column_chunks;
    const int column = lora_elements_per_chunk * (own % column_chunks);
    const Bytes16 values = round_factor_chunk<T>(
        load_factor_chunk(a.factor, rank, first_column + column), a.factor.dtype);
#pragma unroll
    for (int i = 0; i < lora_elements_per_chunk; ++i) {
      const int chunk = expand_chunk(column + i, rank / lora_elements_per_chunk);
      const std::uint32_t word = values.words[i / 2];
      tile.store(lora_elements_per_chunk * chunk + rank % lora_elements_per_chunk,
                 i % 2 == 0 ? low_half<T>(word) : high_half<T>(word));
    }
  }
}

/// An even rank of a token and the next, zeros for what is outside.
template <typename T>
__device__ std::uint32_t load_narrow_pair(const LoRAExpandArguments<T>& a, std::int64_t token,
                                          std::int64_t rank) {
  if (token >= a.tokens || rank >= a.ranks) return 0;
  const T* const from = a.narrow + token * a.ranks + rank;
  if (a.has_narrow_pairs) return *reinterpret_cast<const std::uint32_t*>(from);
  const std::uint32_t second = rank + 1 < a.ranks ? from[1].bits : 0u;
  return from[0].bits | second << 16;
}

/// wide[i, c] += scale * narrow[i, :] · factor[c, :] (or factor[:, c]), rounded once.
///
///   narrow T [tokens, ranks], wide T [tokens, columns]; factor any float dtype, rounded to T
///   a thread block owns 128 columns and a group of tokens, 64 at a time; a warp 16 tokens of them
///   and 64 columns, which are on their way (16 KB a thread block) before it multiplies
///   reads and writes wide once; reads narrow, from L2, once for every 64 columns
///   shared memory: 256 bytes a rank, ranks rounded up to 16
///   precondition: T is a 16-bit type; columns % 8 == 0; wide is aligned to 16 bytes
template <typename T>
__global__ void __launch_bounds__(lora_threads, 3)
    lora_expand_kernel(const LoRAExpandArguments<T> a) {
  const int lane = static_cast<int>(threadIdx.x % lanes_per_warp);
  const int warp = warp_index(static_cast<int>(threadIdx.x));
  const std::int64_t first_column = std::int64_t{blockIdx.x % a.column_tiles} * lora_tile;
  const std::int64_t first_tile =
      std::int64_t{blockIdx.x / a.column_tiles} * a.token_tiles_per_group;
  const std::int64_t end_tile = std::min(first_tile + a.token_tiles_per_group, a.token_tiles);
  const int rank_steps = static_cast<int>((a.ranks + 15) / 16);

  constexpr int groups = lora_expand_columns_per_warp / 32;  // of 32 columns
  const int warp_column = lora_expand_columns_per_warp * (warp / 4);
  const int token_in_tile = 16 * (warp % 4) + lane / 4;
  const auto wide_chunk = [&](std::int64_t token_tile, int half, int group) -> T* {
    const std::int64_t token = token_tile * lora_expand_tokens + token_in_tile + 8 * half;
    const std::int64_t column = first_column + warp_column + 32 * group + 8 * (lane % 4);
    return token < a.tokens && column < a.columns ? a.wide + token * a.columns + column : nullptr;
  };
  Bytes16 wide[2][groups];
  const auto load_wide = [&](std::int64_t token_tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int group = 0; group < groups; ++group) {
        const T* const from = wide_chunk(token_tile, half, group);
        wide[half][group] = from != nullptr ? load_16_bytes(from) : Bytes16{};
      }
    }
  };

  load_wide(first_tile);  // on its way while the factor is rounded
  const Shared<T> tile = dynamic_shared_memory<T>();
  store_expand_tile(tile, a, first_column, 2 * rank_steps);
  __syncthreads();

  const MatrixRow own = matrix_row_across(lane);
#pragma unroll 1
  for (std::int64_t token_tile = first_tile; token_tile < end_tile; ++token_tile) {
    const std::int64_t token = token_tile * lora_expand_tokens + token_in_tile;
    float updates[4 * groups][4] = {};  // by product, in mma's layout
#pragma unroll 1
    for (int step = 0; step < rank_steps; ++step) {
      const int rank = 16 * step + 2 * (lane % 4);
      const std::uint32_t ranks[4] = {
          load_narrow_pair(a, token, rank), load_narrow_pair(a, token + 8, rank),
          load_narrow_pair(a, token, rank + 8), load_narrow_pair(a, token + 8, rank + 8)};
      __syncwarp();  // ldmatrix and mma want all lanes, also those with nothing to load
#pragma unroll
      for (int product = 0; product < 4 * groups; product += 2) {
        const int chunk = (2 * step + own.chunk) * lora_tile + warp_column + 8 * product + own.row;
        std::uint32_t b[4];
        load_matrices(b, tile + lora_elements_per_chunk * chunk);
        const std::uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
        multiply_accumulate<T>(updates[product], ranks, first);
        multiply_accumulate<T>(updates[product + 1], ranks, second);
      }
    }

#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int group = 0; group < groups; ++group) {
        Bytes16 out;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const std::uint32_t word = wide[half][group].words[i];
          const float(&update)[4] = updates[4 * group + i];
          out.words[i] = round_pair<T>(widen(low_half<T>(word)) + a.scale * update[2 * half],
                                       widen(high_half<T>(word)) + a.scale * update[2 * half + 1]);
        }
        if (T* const to = wide_chunk(token_tile, half, group)) store_16_bytes(to, out);
      }
    }
    if (token_tile + 1 < end_tile) load_wide(token_tile + 1);
  }
}

}  // namespace qlora::cuda
