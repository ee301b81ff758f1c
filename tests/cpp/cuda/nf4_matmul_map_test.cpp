// In the kernels for few tokens every weight meets the activation of its own column or row, once,
// and has a place in the output; and look-ups in shared memory use all banks.
#include <map>
#include <set>
#include <tuple>
#include <vector>

#include <gtest/gtest.h>

#include "cuda/nf4_matmul_few_tokens_map.h"

namespace qlora::cuda {
namespace {

/// The terms of an mma that a lane holds, in the order of its fragments' registers (PTX ISA, matrix
/// fragments of mma.m16n8k16): of each pair in {0, 1, 2, 3}, two of the first register and two of
/// the second.
std::vector<int> mma_terms(int pair) {
  return {2 * pair, 2 * pair + 1, 2 * pair + 8, 2 * pair + 9};
}

TEST(NF4FewTokensMap, ForwardCoversTheColumnsOfAUnitOnce) {
  std::set<int> columns;
  for (int lane = 0; lane < 4; ++lane) {  // the pairs of one group
    for (int step = 0; step < forward_steps_per_unit; ++step) {
      for (int i = 0; i < 4; ++i) {
        EXPECT_TRUE(columns.insert(forward_column(lane) + 4 * step + i).second);
      }
    }
  }
  EXPECT_EQ(static_cast<int>(columns.size()), forward_columns_per_unit);
  EXPECT_EQ(*columns.begin(), 0);
  EXPECT_EQ(*columns.rbegin(), forward_columns_per_unit - 1);
}

TEST(NF4FewTokensMap, ForwardStepsAreWholeMmas) {
  for (int step = 0; step < forward_steps_per_unit; ++step) {
    std::map<int, int> column_of_term;
    for (int pair = 0; pair < 4; ++pair) {
      const std::vector<int> terms = mma_terms(pair);
      for (int i = 0; i < 4; ++i) {
        column_of_term[terms[static_cast<std::size_t>(i)]] = forward_column(pair) + 4 * step + i;
      }
    }
    EXPECT_EQ(column_of_term.size(), static_cast<std::size_t>(terms_per_mma));
  }
}

TEST(NF4FewTokensMap, GradInputCoversATileOfTheWeightOnce) {
  for (const int token_tiles : {1, 2, 4}) {
    std::set<std::pair<int, int>> weights;  // row of W, column of W
    for (int group = 0; group < 8; ++group) {
      for (int pair = 0; pair < 4; ++pair) {
        for (int r = 0; r < grad_rows_per_lane; ++r) {
          for (int c = 0; c < grad_columns_per_lane(token_tiles); ++c) {
            EXPECT_TRUE(weights
                            .insert({grad_rows_per_lane * pair + r,
                                     group * grad_columns_per_lane(token_tiles) + c})
                            .second);
          }
        }
      }
    }
    EXPECT_EQ(static_cast<int>(weights.size()), grad_rows_per_unit * grad_columns(token_tiles));
    EXPECT_EQ(*weights.rbegin(), std::pair(grad_rows_per_unit - 1, grad_columns(token_tiles) - 1));
  }
}

TEST(NF4FewTokensMap, ALanesColumnsAreOfOneBlock) {
  EXPECT_EQ(nf4_min_block_size % forward_columns_per_lane, 0);
  for (const int token_tiles : {1, 2, 4}) {
    EXPECT_EQ(nf4_min_block_size % grad_columns_per_lane(token_tiles), 0);
    EXPECT_EQ(forward_columns_per_lane % grad_columns_per_lane(token_tiles), 0) << "no load is cut";
  }
}

TEST(NF4FewTokensMap, SharedScalesComeFromALaneThatHasTheRowAndTheBlock) {
  for (int lane = 0; lane < 32; ++lane) {
    for (int row = 0; row < 4; ++row) {  // of a lane's
      const int forward = forward_scale_owner(lane, row);
      EXPECT_EQ(forward / 4, lane / 4) << "the same rows";
      EXPECT_EQ(forward % 2, row % 2) << "it loads rows of its parity";
      EXPECT_EQ(forward_column(forward) / columns_per_scale(Direction::forward, 1),
                forward_column(lane) / columns_per_scale(Direction::forward, 1));
      const int grad = grad_scale_owner(lane, row);
      EXPECT_EQ(grad % 4, lane % 4) << "the same rows";
      EXPECT_EQ(grad / 4 % grad_rows_per_lane, row) << "it loads that row";
      for (const int token_tiles : {1, 2, 4}) {
        const int columns = grad_columns_per_lane(token_tiles);
        const int shared = columns_per_scale(Direction::grad_input, token_tiles);
        EXPECT_EQ(grad / 4 * columns / shared, lane / 4 * columns / shared);
      }
    }
  }
}

TEST(NF4FewTokensMap, ALookUpUsesEveryBankOnce) {
  for (int half = 0; half < 2; ++half) {  // 8-byte reads go by half warps
    std::set<int> banks;
    for (int lane = 16 * half; lane < 16 * half + 16; ++lane) {
      const int byte_of_codes = 37 * lane % 256;
      const int address = (byte_of_codes * level_pair_copies + lane % level_pair_copies) * 8;
      EXPECT_LE(address + 8, level_pair_bytes);
      banks.insert(address / 4 % 32);
      banks.insert(address / 4 % 32 + 1);
    }
    EXPECT_EQ(banks.size(), 32u);
  }
}

TEST(NF4FewTokensMap, PicksTilesOfTokens) {
  for (const auto& [m, tiles] :
       {std::pair<std::int64_t, int>{1, 1}, {8, 1}, {9, 2}, {16, 2}, {17, 4}, {32, 4}}) {
    EXPECT_EQ(token_tiles_for(m), tiles) << m;
  }
}

TEST(NF4FewTokensMap, HasRoomForTheSumsOfHalfTheWarps) {
  for (const Direction direction : {Direction::forward, Direction::grad_input}) {
    for (const int token_tiles : {1, 2, 4}) {
      EXPECT_GE(few_tokens_shared_bytes(direction, token_tiles), level_pair_bytes);
      EXPECT_GE(few_tokens_shared_bytes(direction, token_tiles),
                few_tokens_warps / 2 * 32 * 4 * few_tokens_sums(direction, token_tiles));
    }
  }
}

}  // namespace
}  // namespace qlora::cuda
