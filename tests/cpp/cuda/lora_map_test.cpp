// LoRA's maps of shared memory: one place for each chunk, no bank conflicts, and the order of
// matrices that mma asks for, against the tables of the PTX manual.
#include "cuda/lora_map.h"

#include <set>

#include <gtest/gtest.h>

namespace qlora::cuda {
namespace {

/// ldmatrix and 16-byte accesses take eight lanes at a time; a chunk covers 4 of the 32 banks.
void expect_no_conflict(const std::set<int>& banks_of_four) { EXPECT_EQ(banks_of_four.size(), 8u); }

TEST(LoRAMap, ASwizzledTileHasOnePlaceForEachChunk) {
  for (const int chunks_per_row : {8, 16}) {
    const int rows = lora_tile * lora_step / lora_elements_per_chunk / chunks_per_row;
    std::set<int> places;
    for (int row = 0; row < rows; ++row) {
      for (int chunk = 0; chunk < chunks_per_row; ++chunk) {
        places.insert(swizzled_chunk(chunks_per_row, row, chunk));
      }
    }
    EXPECT_EQ(static_cast<int>(places.size()), rows * chunks_per_row);
    EXPECT_EQ(*places.begin(), 0);
    EXPECT_EQ(*places.rbegin(), rows * chunks_per_row - 1);
    EXPECT_LE(rows * chunks_per_row * 16, lora_tile_bytes);
  }
}

TEST(LoRAMap, ASwizzledTileHasNoBankConflicts) {
  for (const int chunks_per_row : {8, 16}) {
    for (int row = 0; row < 64; row += 8) {
      for (int chunk = 0; chunk < chunks_per_row; ++chunk) {
        std::set<int> column, neighbours;  // what ldmatrix reads, and what eight lanes copy
        for (int i = 0; i < 8; ++i) {
          column.insert(swizzled_chunk(chunks_per_row, row + i, chunk) % 8);
          neighbours.insert(swizzled_chunk(chunks_per_row, row + 1, chunk / 8 * 8 + i) % 8);
        }
        expect_no_conflict(column);
        expect_no_conflict(neighbours);
      }
    }
  }
}

// PTX ISA, mma.m16n8k16: register i of A holds rows 0-7 (i even) or 8-15, and k 0-7 (i < 2) or 8-15;
// register i of B holds k 0-7 (i = 0) or 8-15.
TEST(LoRAMap, MatricesComeInTheOrderThatMmaAsksFor) {
  for (int lane = 0; lane < 32; ++lane) {
    const int matrix = lane / 8;
    const MatrixRow down = matrix_row_down(lane), across = matrix_row_across(lane);
    // Rows of the tile are rows of A.
    EXPECT_EQ(down.row, 8 * (matrix % 2) + lane % 8);
    EXPECT_EQ(down.chunk, matrix / 2);
    // Rows of the tile are columns of B, two products: registers 0 and 1 of the first 8, then of
    // the others. Read transposed, rows are k of A, chunks its rows.
    EXPECT_EQ(across.row, 8 * (matrix / 2) + lane % 8);
    EXPECT_EQ(across.chunk, matrix % 2);
  }
}

TEST(LoRAMap, ExpandGivesALaneAChunkOfTheOutput) {
  for (int pair = 0; pair < 4; ++pair) {
    for (int product = 0; product < 4; ++product) {
      for (int i = 0; i < 2; ++i) {
        const int column = expand_column(product, 2 * pair + i);
        EXPECT_EQ(column, 8 * pair + 2 * product + i);
        EXPECT_EQ(expand_slot(column), 8 * product + 2 * pair + i);
      }
    }
  }
}

TEST(LoRAMap, ExpandsTileHasOnePlaceForEachChunkAndNoBankConflicts) {
  for (const int rank_chunks : {2, 32}) {
    std::set<int> places;
    for (int column = 0; column < lora_tile; ++column) {
      for (int chunk = 0; chunk < rank_chunks; ++chunk) places.insert(expand_chunk(column, chunk));
    }
    EXPECT_EQ(static_cast<int>(places.size()), lora_tile * rank_chunks);
    EXPECT_EQ(*places.rbegin(), lora_tile * rank_chunks - 1);
  }
  for (int column = 0; column < lora_tile; column += 32) {
    for (int product = 0; product < 4; ++product) {
      std::set<int> matrix;
      for (int i = 0; i < 8; ++i) {
        matrix.insert(expand_chunk(column + expand_column(product, i), 3) % 8);
        // Where the kernel looks for it.
        EXPECT_EQ(expand_chunk(column + expand_column(product, i), 3),
                  3 * lora_tile + column + 8 * product + i);
      }
      expect_no_conflict(matrix);
    }
  }
}

}  // namespace
}  // namespace qlora::cuda
