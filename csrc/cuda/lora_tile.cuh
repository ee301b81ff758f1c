// Tiles in shared memory and the products of their fragments, as the two summing kernels of LoRA
// (shrink, gradients) use them.
#pragma once

#include "cuda/copy_async.cuh"
#include "cuda/lora_map.h"
#include "cuda/mma.cuh"

namespace qlora::cuda {

/// Rows of `chunks_per_row` chunks, swizzled.
template <typename T, int chunks_per_row>
class LoRATile {
 public:
  __device__ explicit LoRATile(Shared<T> memory) : memory_(memory) {}

  __device__ Shared<T> chunk(int row, int chunk) const {
    return memory_ + lora_elements_per_chunk * swizzled_chunk(chunks_per_row, row, chunk);
  }

  /// The 16 x 16 elements from `row` and chunk `chunk` on, as four matrices (lora_map.h).
  __device__ void load_down(std::uint32_t (&r)[4], int row, int first_chunk, int lane) const {
    const MatrixRow own = matrix_row_down(lane);
    load_matrices(r, chunk(row + own.row, first_chunk + own.chunk));
  }
  __device__ void load_across(std::uint32_t (&r)[4], int row, int first_chunk, int lane) const {
    const MatrixRow own = matrix_row_across(lane);
    load_matrices(r, chunk(row + own.row, first_chunk + own.chunk));
  }
  __device__ void load_down_transposed(std::uint32_t (&r)[4], int row, int first_chunk,
                                       int lane) const {
    const MatrixRow own = matrix_row_down(lane);
    load_matrices_transposed(r, chunk(row + own.row, first_chunk + own.chunk));
  }
  __device__ void load_across_transposed(std::uint32_t (&r)[4], int row, int first_chunk,
                                         int lane) const {
    const MatrixRow own = matrix_row_across(lane);
    load_matrices_transposed(r, chunk(row + own.row, first_chunk + own.chunk));
  }

 private:
  Shared<T> memory_;
};

/// Copies `rows` rows of a tile from a matrix [row_count, column_count] of whole chunks, by all
/// threads of the thread block; what is outside of the matrix becomes zeros.
template <int rows, typename T, int chunks_per_row>
__device__ void copy_tile(const LoRATile<T, chunks_per_row>& tile, const T* matrix,
                          std::int64_t row_count, std::int64_t column_count, std::int64_t row,
                          std::int64_t column) {
#pragma unroll
  for (int i = 0; i < rows * chunks_per_row / lora_threads; ++i) {
    const int own = i * lora_threads + static_cast<int>(threadIdx.x);
    const int tile_row = own / chunks_per_row, chunk = own % chunks_per_row;
    const std::int64_t from_row = row + tile_row;
    const std::int64_t from_column = column + lora_elements_per_chunk * chunk;
    const bool is_inside = from_row < row_count && from_column < column_count;
    const T* const from = is_inside ? matrix + from_row * column_count + from_column : matrix;
    copy_async_16(tile.chunk(tile_row, chunk), from, is_inside);
  }
}

/// The sums that a warp holds: 16 rows, and 8 ranks for each `ranks[j]`, as mma lays them out.
struct LoRAAccumulator {
  float ranks[lora_ranks_per_tile / 8][4] = {};

  /// Adds A[16, 16] · B[16, 16] for ranks 16 pair to 16 pair + 15.
  template <typename T>
  __device__ void add(int pair, const std::uint32_t (&a)[4], const std::uint32_t (&b)[4]) {
    const std::uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
    multiply_accumulate<T>(ranks[2 * pair], a, first);
    multiply_accumulate<T>(ranks[2 * pair + 1], a, second);
  }
};

inline constexpr int lora_rank_pairs = lora_ranks_per_tile / 16;

}  // namespace qlora::cuda
