#include "cuda/lora_plan.h"

#include <gtest/gtest.h>

namespace qlora::cuda {
namespace {

TensorView wide(DType dtype, std::int64_t columns, std::uintptr_t address) {
  return {reinterpret_cast<void*>(address), dtype, {}, {3, columns}, true, true};
}

TEST(LoRAPlan, TheTensorCoresTakeAlignedChunksOf16BitTypes) {
  struct Row {
    DType dtype;
    std::int64_t columns;
    std::uintptr_t address;
    LoRAKernel kernel;
  };
  constexpr LoRAKernel mma = LoRAKernel::tensor_cores, plain = LoRAKernel::plain;
  for (const auto& [dtype, columns, address, kernel] : {
           Row{DType::bfloat16, 4096, 256, mma},
           Row{DType::float16, 8, 16, mma},
           Row{DType::float16, 0, 0, mma},
           Row{DType::float32, 4096, 256, plain},
           Row{DType::bfloat16, 4100, 256, plain},
           Row{DType::bfloat16, 7, 256, plain},
           Row{DType::bfloat16, 4096, 264, plain},
           Row{DType::float16, 4096, 258, plain},
       }) {
    SCOPED_TRACE(message(dtype, ", ", columns, " columns at ", address));
    EXPECT_EQ(choose_lora_sum_kernel(wide(dtype, columns, address)), kernel);
    EXPECT_EQ(choose_lora_expand_kernel(wide(dtype, columns, address), 16), kernel);
  }
}

TEST(LoRAPlan, ExpandHoldsAllRanksInSharedMemoryUpTo256) {
  const TensorView y = wide(DType::bfloat16, 4096, 0);
  for (const auto& [r, kernel] : {std::pair{0, LoRAKernel::tensor_cores},
                                  {1, LoRAKernel::tensor_cores},
                                  {64, LoRAKernel::tensor_cores},
                                  {256, LoRAKernel::tensor_cores},
                                  {257, LoRAKernel::plain}}) {
    EXPECT_EQ(choose_lora_expand_kernel(y, r), kernel) << "r = " << r;
  }
}

TEST(LoRAPlan, LongSumsAreSplitWhereThereAreFewTiles) {
  struct Row {
    std::int64_t tiles, steps, parts, steps_per_part;
  };
  for (const auto& [tiles, steps, parts, steps_per_part] : {
           Row{64, 64, 4, 16},                           // shrink, m = 8192, k = 4096
           Row{16, 64, 16, 4},                           // m = 2048
           Row{1, 64, 16, 4},                            // m = 1
           Row{1, 224, 56, 4},                           // m = 1, k = 14336
           Row{1, 10000, 264, 38}, Row{64, 224, 4, 56},  // gradients: n = k = 4096, m = 14336
           Row{32, 128, 8, 16},                          // n = k = 2048, m = 8192
           Row{264, 64, 1, 64},                          // enough tiles
           Row{10000, 64, 1, 64}, Row{1, 7, 1, 7},       // too short to be worth it
           Row{1, 8, 2, 4}, Row{1, 9, 2, 5},
           Row{88, 9, 2, 5},   // 3 wanted, but parts of 4 steps at least
           Row{50, 27, 5, 6},  // the last has 3
           Row{3, 0, 1, 1},    // an empty sum
           Row{0, 5, 1, 5},    // nothing to do
       }) {
    const LoRASplit split = plan_lora_split(tiles, steps);
    SCOPED_TRACE(message(tiles, " tiles, ", steps, " steps"));
    EXPECT_EQ(split.parts, parts);
    EXPECT_EQ(split.steps_per_part, steps_per_part);
  }
}

TEST(LoRAPlan, EveryPartHasAStepAndTogetherTheyHaveAll) {
  for (std::int64_t tiles = 1; tiles < 300; tiles += 7) {
    for (std::int64_t steps = 1; steps < 700; ++steps) {
      const auto [parts, steps_per_part] = plan_lora_split(tiles, steps);
      ASSERT_LT((parts - 1) * steps_per_part, steps) << tiles << " tiles, " << steps << " steps";
      ASSERT_GE(parts * steps_per_part, steps) << tiles << " tiles, " << steps << " steps";
    }
  }
}

TEST(LoRAPlan, TokensAreGroupedWhereThereAreManyTiles) {
  EXPECT_EQ(plan_lora_token_groups(128, 32), 33);   // m = 8192, n = 4096
  EXPECT_EQ(plan_lora_token_groups(32, 32), 32);    // m = 2048: a tile each
  EXPECT_EQ(plan_lora_token_groups(1, 32), 1);      // m = 1
  EXPECT_EQ(plan_lora_token_groups(128, 2000), 1);  // n = 256000
  EXPECT_EQ(plan_lora_token_groups(0, 0), 1);
}

}  // namespace
}  // namespace qlora::cuda
