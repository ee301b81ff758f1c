// How products are cut into thread blocks: every stage once, and enough thread blocks.
#include "cuda/nf4_matmul_tiles_plan.h"

#include <gtest/gtest.h>

namespace qlora::cuda::tiles {
namespace {

constexpr DeviceTraits h200 = {90, 132, 227 * 1024, 60 << 20};
constexpr DeviceTraits rtx_4090 = {89, 128, 99 * 1024, 72 << 20};

TEST(NF4MatmulTilesPlan, CoversEveryTokenColumnAndStage) {
  for (const std::int64_t m : {1, 64, 65, 70, 128, 129, 1024}) {
    for (const std::int64_t columns : {1, 128, 136, 1024, 4096, 14336}) {
      for (const std::int64_t reduced : {0, 32, 64, 192, 4096, 11008}) {
        const Plan plan = choose_plan(m, columns, reduced, h200);
        EXPECT_TRUE(plan.tokens == 64 || plan.tokens == 128);
        EXPECT_EQ(plan.token_tiles, ceil_divide(m, plan.tokens));
        EXPECT_EQ(plan.column_tiles, ceil_divide(columns, columns_per_tile));
        EXPECT_EQ(plan.stage_count, ceil_divide(reduced, reduced_per_stage));
        EXPECT_GE(plan.splits * plan.stages_per_split, plan.stage_count);
        if (plan.splits > 1) {
          EXPECT_LT((plan.splits - 1) * plan.stages_per_split, plan.stage_count);
          EXPECT_GE(plan.stages_per_split, min_stages_per_split);
        }
        EXPECT_GE(plan.splits, 1);
        EXPECT_LE(plan.splits, max_splits);
      }
    }
  }
}

TEST(NF4MatmulTilesPlan, FillsTheDevice) {
  for (const DeviceTraits& device : {h200, rtx_4090}) {
    for (const std::int64_t m : {65, 128, 256, 512, 1024}) {
      for (const std::int64_t columns : {4096, 14336}) {
        EXPECT_GE(choose_plan(m, columns, 4096, device).thread_blocks(),
                  device.multiprocessor_count * 3 / 4)
            << m << " tokens, " << columns << " columns";
      }
    }
  }
}

TEST(NF4MatmulTilesPlan, SplitsSumsOnlyWhereThereAreFewTiles) {
  EXPECT_GT(choose_plan(128, 4096, 4096, h200).splits, 1);
  EXPECT_EQ(choose_plan(1024, 14336, 4096, h200).splits, 1);
  EXPECT_EQ(choose_plan(1024, 14336, 4096, h200).tokens, 128);
}

TEST(NF4MatmulTilesPlan, TakesTheSmallTileWhereAMultiprocessorHoldsOnlyOneOfTheLarge) {
  EXPECT_EQ(choose_plan(1024, 14336, 4096, rtx_4090).tokens, 64);
}

TEST(NF4MatmulTilesPlan, TakesTheSmallTileWhereTheLargeOneDoesNotFit) {
  DeviceTraits small = h200;
  small.max_shared_bytes = shared_bytes(64);
  EXPECT_EQ(choose_plan(1024, 14336, 4096, small).tokens, 64);
  EXPECT_TRUE(has_plan(1024, 14336, small));
  small.max_shared_bytes = shared_bytes(64) - 1;
  EXPECT_EQ(choose_plan(1024, 14336, 4096, small).tokens, 0);
  EXPECT_FALSE(has_plan(1024, 14336, small));
}

TEST(NF4MatmulTilesPlan, FitsAGrid) {
  constexpr std::int64_t most_tiles = std::numeric_limits<int>::max() / max_splits;
  EXPECT_TRUE(has_plan(64 * most_tiles, columns_per_tile, h200));
  EXPECT_FALSE(has_plan(64 * most_tiles + 1, columns_per_tile, h200));
}

}  // namespace
}  // namespace qlora::cuda::tiles
