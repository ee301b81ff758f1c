// Where the elements of LoRA's products lie in shared memory, and which lane holds which of them.
// Pure C++: the host tests prove the maps one-to-one and count shared memory's bank conflicts.
//
//   chunk   8 neighbours of a row, 16 bytes of a 16-bit type: what one copy, one ldmatrix row and one
//           access of a lane moves
//   step    64 of the elements that are summed over
//   tile    128 rows (shrink) or columns (expand, gradients) of the wide matrix: x, y, dy or dx
#pragma once

#include "format/host_device.h"

namespace qlora::cuda {

inline constexpr int lora_threads = 256;
inline constexpr int lora_elements_per_chunk = 8;
inline constexpr int lora_step = 64;
inline constexpr int lora_tile = 128;

// Ranks that a thread block of the two summing kernels takes: 32 fp32 sums a lane. Higher ranks are
// further tiles, each of which reads the wide matrix again (mostly from L2).
inline constexpr int lora_ranks_per_tile = 64;

// Tiles of the wide matrix in shared memory, so that two are on their way while one is multiplied:
// 32 KB a thread block, of which an SM of an H200 holds two. (Its memory wants 26 KB an SM.)
inline constexpr int lora_stages = 3;

inline constexpr int lora_tile_bytes = lora_tile * lora_step * 2;
inline constexpr int lora_rank_tile_bytes = lora_ranks_per_tile * lora_step * 2;

// shrink: the stages of the wide tile, two factor tiles. gradients: the stages of both tiles.
inline constexpr int lora_shrink_shared_bytes =
    lora_stages * lora_tile_bytes + 2 * lora_rank_tile_bytes;
inline constexpr int lora_gradients_shared_bytes =
    lora_stages * (lora_tile_bytes + lora_rank_tile_bytes);

// expand: tokens of a step, by 4 warps; the other 4 take the other half of the columns.
inline constexpr int lora_expand_tokens = 64;
inline constexpr int lora_expand_columns_per_warp = 64;

/// The place, in chunks, of a chunk in a tile in shared memory whose rows are a multiple of 8 chunks
/// long. Eight neighbours of a row, and a column of eight rows, each touch all 32 banks once.
QLORA_HOST_DEVICE constexpr int swizzled_chunk(int chunks_per_row, int row, int chunk) {
  return row * chunks_per_row + (chunk ^ (row & 7));
}

/// The row and chunk whose address a lane passes to ldmatrix, for four 8 x 8 matrices that form a
/// square of 16 x 16 elements.
struct MatrixRow {
  int row, chunk;
};

/// The upper left matrix first, then the lower left, the upper right, the lower right: mma's order
/// of A[16, 16] from its rows, and of two neighbouring B[16, 8] from transposed loads of rows along
/// k.
QLORA_HOST_DEVICE constexpr MatrixRow matrix_row_down(int lane) {
  return {8 * (lane / 8 % 2) + lane % 8, lane / 16};
}

/// The upper left matrix first, then the upper right: mma's order of two neighbouring B[16, 8] from
/// rows that are columns of B, and of A[16, 16] from transposed loads of rows along k.
QLORA_HOST_DEVICE constexpr MatrixRow matrix_row_across(int lane) {
  return {8 * (lane / 16) + lane % 8, lane / 8 % 2};
}

/// expand: which column of its 32 mma's column `column` (of 8) of product `product` (of 4) computes.
///
/// Lane l then holds columns 8 (l % 4) to 8 (l % 4) + 7 of its rows, two a product: a chunk of y.
QLORA_HOST_DEVICE constexpr int expand_column(int product, int column) {
  return 8 * (column / 2) + 2 * product + column % 2;
}

/// The inverse: 8 * product + column of the product that computes column `c` of 32.
QLORA_HOST_DEVICE constexpr int expand_slot(int c) { return 8 * (c % 8 / 2) + 2 * (c / 8) + c % 2; }

/// The place, in chunks, of ranks 8 rank_chunk and up of a column of the factor in expand's tile: the
/// eight rows that an ldmatrix reads are neighbours.
QLORA_HOST_DEVICE constexpr int expand_chunk(int column, int rank_chunk) {
  return rank_chunk * lora_tile + column / 32 * 32 + expand_slot(column % 32);
}

}  // namespace qlora::cuda
