// Plans of products with an NF4 weight, as a table; and every plan fits its device.
#include "cuda/nf4_matmul_plan.h"

#include <gtest/gtest.h>

#include "core/check.h"
#include "cuda/nf4_matmul_few_tokens_map.h"

namespace qlora::cuda {
namespace {

constexpr DeviceTraits a100 = {80, 108, 163 * 1024, 40 << 20};
constexpr DeviceTraits rtx3090 = {86, 82, 99 * 1024, 6 << 20};
constexpr DeviceTraits rtx4090 = {89, 128, 99 * 1024, 72 << 20};
constexpr DeviceTraits h200 = {90, 132, 227 * 1024, 50 << 20};
constexpr DeviceTraits b200 = {100, 148, 227 * 1024, 126 << 20};
constexpr DeviceTraits rtx5090 = {120, 170, 99 * 1024, 96 << 20};
constexpr DeviceTraits devices[] = {a100, rtx3090, rtx4090, h200, b200, rtx5090};

NF4MatmulProblem problem(Direction direction, std::int64_t m, std::int64_t n, std::int64_t k,
                         bool is_taken = true) {
  return {direction, m, n, k, is_taken, is_taken};
}

struct Line {
  std::int64_t m;
  bool is_taken;
  Strategy advised, native;
};

TEST(NF4MatmulPlan, IsATableOfTokens) {
  for (const auto& [m, is_taken, advised, native] : {
           Line{1, true, Strategy::few_tokens, Strategy::few_tokens},
           Line{32, true, Strategy::few_tokens, Strategy::few_tokens},
           Line{33, true, Strategy::tiles, Strategy::tiles},
           Line{512, true, Strategy::tiles, Strategy::tiles},
           Line{513, true, Strategy::workspace, Strategy::tiles},
           Line{1, false, Strategy::plain, Strategy::plain},
           Line{4, false, Strategy::plain, Strategy::plain},
           Line{5, false, Strategy::workspace, Strategy::plain},
       }) {
    for (const Direction direction : {Direction::forward, Direction::grad_input}) {
      const NF4MatmulPlan plan = plan_nf4_matmul(problem(direction, m, 4096, 4096, is_taken), h200);
      EXPECT_EQ(plan.advised, advised) << m << " tokens: " << plan;
      EXPECT_EQ(plan.native, native) << m << " tokens: " << plan;
    }
  }
}

TEST(NF4MatmulPlan, GoesByTheDevice) {
  const auto advised = [](std::int64_t m, const DeviceTraits& device) {
    return plan_nf4_matmul(problem(Direction::forward, m, 4096, 4096), device).advised;
  };
  EXPECT_EQ(advised(1024, a100), Strategy::tiles);
  EXPECT_EQ(advised(1024, h200), Strategy::workspace);
  EXPECT_EQ(advised(1024, b200), Strategy::workspace);
  EXPECT_EQ(advised(1024, rtx5090), Strategy::tiles);
  EXPECT_EQ(advised(1025, rtx5090), Strategy::workspace);
}

TEST(NF4MatmulPlan, WithoutTheKernelForTilesGoesElsewhere) {
  NF4MatmulProblem few_only = problem(Direction::forward, 32, 4096, 4096);
  few_only.is_taken_by_tiles = false;
  EXPECT_EQ(plan_nf4_matmul(few_only, h200).advised, Strategy::few_tokens);
  few_only.m = 33;
  EXPECT_EQ(plan_nf4_matmul(few_only, h200).advised, Strategy::workspace);
  EXPECT_EQ(plan_nf4_matmul(few_only, h200).native, Strategy::plain);
}

TEST(NF4MatmulPlan, CutsFewTokensToFillTheDevice) {
  const auto plan = [](Direction direction, std::int64_t m, std::int64_t n, std::int64_t k) {
    return plan_few_tokens(problem(direction, m, n, k), h200);
  };
  constexpr int bytes = 32 * 1024;
  constexpr Direction forward = Direction::forward, grad_input = Direction::grad_input;
  EXPECT_EQ(plan(forward, 1, 4096, 4096), (FewTokensPlan{1, 1, 256, bytes}));
  EXPECT_EQ(plan(forward, 1, 1024, 4096), (FewTokensPlan{1, 2, 128, bytes}));
  EXPECT_EQ(plan(forward, 9, 4096, 4096), (FewTokensPlan{2, 2, 256, bytes}));
  EXPECT_EQ(plan(forward, 32, 4096, 14336), (FewTokensPlan{4, 1, 128, bytes}));
  EXPECT_EQ(plan(forward, 1, 14336, 4096), (FewTokensPlan{1, 1, 896, bytes}));
  EXPECT_EQ(plan(forward, 1, 1, 32), (FewTokensPlan{1, 1, 1, bytes}));
  EXPECT_EQ(plan(grad_input, 1, 4096, 4096), (FewTokensPlan{1, 8, 256, bytes}));
  EXPECT_EQ(plan(grad_input, 16, 4096, 4096), (FewTokensPlan{2, 8, 256, bytes}));
  EXPECT_EQ(plan(grad_input, 32, 4096, 4096), (FewTokensPlan{4, 4, 256, bytes}));
  EXPECT_EQ(plan(grad_input, 1, 4096, 14336), (FewTokensPlan{1, 2, 224, bytes}));
  EXPECT_EQ(plan(grad_input, 1, 255, 32), (FewTokensPlan{1, 1, 1, bytes}));
}

TEST(NF4MatmulPlan, FitsEveryDevice) {
  for (const DeviceTraits& device : devices) {
    for (const Direction direction : {Direction::forward, Direction::grad_input}) {
      for (const std::int64_t m : {1, 8, 9, 16, 17, 32}) {
        for (const std::int64_t n : {1, 33, 1024, 4096, 14336, 1 << 30}) {
          for (const std::int64_t k : {32, 1024, 4096, 14336}) {
            const FewTokensPlan plan = plan_few_tokens(problem(direction, m, n, k), device);
            EXPECT_GE(plan.token_tiles * tokens_per_mma, m);
            EXPECT_LE(plan.shared_bytes, device.max_shared_bytes);
            EXPECT_LE(2 * plan.shared_bytes, 99 * 1024) << "two thread blocks are resident";
            EXPECT_GE(plan.split, 1);
            EXPECT_GE(plan.thread_blocks, 1);
            EXPECT_LT(plan.thread_blocks, std::int64_t{1} << 31);
            if (plan.split > 1) {
              EXPECT_LE(plan.thread_blocks, 2 * device.multiprocessor_count);
            }
          }
        }
      }
    }
  }
}

TEST(NF4MatmulPlan, CanBeRead) {
  EXPECT_EQ(message(plan_nf4_matmul(problem(Direction::forward, 1, 4096, 4096), h200)),
            "few_tokens: 1 tiles of tokens, split 1, 256 thread blocks, 32768 shared bytes");
  EXPECT_EQ(message(plan_nf4_matmul(problem(Direction::forward, 4096, 4096, 4096), h200)),
            "workspace (native: tiles)");
}

}  // namespace
}  // namespace qlora::cuda
