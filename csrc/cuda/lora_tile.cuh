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

/// What a thread copies of the tiles of a matrix [row_count, column_count] of whole chunks: in each
/// the same chunk of every few rows. What is outside of the matrix becomes zeros.
template <typename T, int rows, int chunks_per_row>
class LoRATileCopy {
 public:
  /// From the tile that begins at `row` and `column` on.
  __device__ LoRATileCopy(const T* matrix, std::int64_t row_count, std::int64_t column_count,
                          std::int64_t row, std::int64_t column)
      : matrix_(matrix),
        row_stride_(column_count),
        rows_left_(row_count - row - own_row()),
        columns_left_(column_count - column - lora_elements_per_chunk * own_chunk()),
        from_(matrix + (row_count - rows_left_) * column_count + (column_count - columns_left_)) {}

  /// Starts the copies of a tile, or of its first `chunks` columns of chunks.
  __device__ void copy(const LoRATile<T, chunks_per_row>& tile, int chunks = chunks_per_row) const {
    if (own_chunk() >= chunks) return;
#pragma unroll
    for (int row = 0; row < rows; row += rows_at_a_time) {
      const bool is_inside = row < rows_left_ && columns_left_ > 0;
      copy_async_16(tile.chunk(own_row() + row, own_chunk()),
                    is_inside ? from_ + row * row_stride_ : matrix_, is_inside);
    }
  }

  /// The next tile begins a step to the right, or a step down.
  __device__ void move_right() {
    from_ += lora_step;
    columns_left_ -= lora_step;
  }
  __device__ void move_down() {
    from_ += lora_step * row_stride_;
    rows_left_ -= lora_step;
  }

 private:
  static constexpr int rows_at_a_time = lora_threads / chunks_per_row;
  static_assert(rows % rows_at_a_time == 0);
  __device__ static int own_row() { return static_cast<int>(threadIdx.x) / chunks_per_row; }
  __device__ static int own_chunk() { return static_cast<int>(threadIdx.x) % chunks_per_row; }

  const T* matrix_;
  std::int64_t row_stride_, rows_left_, columns_left_;
  const T* from_;
};

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
