// The map of an optimiser's launch: every element has exactly one owner.
#include "cuda/optimizer_chunks.h"

#include <algorithm>
#include <vector>

#include <gtest/gtest.h>

namespace qlora::cuda {
namespace {

using Sizes = std::vector<std::int64_t>;

void expect_one_owner_each(const Sizes& sizes) {
  ChunkTable table;
  for (const std::int64_t size : sizes) ASSERT_TRUE(table.append(size));
  ASSERT_EQ(table.tensor_count(), static_cast<int>(sizes.size()));
  Sizes next(sizes.size());  // the first element of each tensor that has no owner yet
  for (std::uint32_t chunk = 0; chunk < table.chunk_count(); ++chunk) {
    const int tensor = table.tensor_of(chunk);
    const auto at = static_cast<std::size_t>(tensor);
    ASSERT_EQ(table.first_element(tensor, chunk), next[at]) << "chunk " << chunk;
    ASSERT_LT(next[at], sizes[at]);
    next[at] = std::min(next[at] + elements_per_chunk, sizes[at]);
  }
  EXPECT_EQ(next, sizes);
}

TEST(OptimizerChunks, EveryElementHasOneOwner) {
  expect_one_owner_each({1});
  expect_one_owner_each({elements_per_chunk});
  expect_one_owner_each({0, 1, 0, 0, 4095, 4096, 4097, 0, 100000, 3, 0});
  expect_one_owner_each(Sizes(tensors_per_launch, 1));
  expect_one_owner_each(Sizes(tensors_per_launch, 5000));
  Sizes growing;
  for (std::int64_t i = 0; i < 300; ++i) growing.push_back(i * 97);
  expect_one_owner_each(growing);
}

TEST(OptimizerChunks, AListOfEmptyTensorsHasNoChunks) {
  ChunkTable table;
  EXPECT_EQ(table.chunk_count(), 0u);
  EXPECT_TRUE(table.append(0));
  EXPECT_EQ(table.chunk_count(), 0u);
  EXPECT_EQ(table.tensor_count(), 1);
}

TEST(OptimizerChunks, MoreElementsThan32BitsCountAreOwned) {
  constexpr std::int64_t huge = (std::int64_t{1} << 33) + 5;
  ChunkTable table;
  ASSERT_TRUE(table.append(huge));
  ASSERT_TRUE(table.append(7));
  const std::uint32_t last = table.chunk_count() - 1;
  EXPECT_EQ(table.tensor_of(last), 1);
  EXPECT_EQ(table.first_element(1, last), 0);
  EXPECT_EQ(table.tensor_of(last - 1), 0);
  EXPECT_EQ(table.first_element(0, last - 1), huge - 5);
  EXPECT_EQ(table.first_element(0, 1u << 20), std::int64_t{1} << 32);
}

TEST(OptimizerChunks, WhatDoesNotFitIsLeftForTheNextLaunch) {
  ChunkTable full;
  for (int i = 0; i < tensors_per_launch; ++i) ASSERT_TRUE(full.append(1));
  EXPECT_FALSE(full.append(1));
  EXPECT_FALSE(full.append(0));
  EXPECT_EQ(full.tensor_count(), tensors_per_launch);

  ChunkTable large;
  ASSERT_TRUE(large.append(1));
  EXPECT_FALSE(large.append(ChunkTable::max_chunks * elements_per_chunk));
  EXPECT_TRUE(large.append((ChunkTable::max_chunks - 1) * elements_per_chunk));
  EXPECT_FALSE(large.append(1));
}

TEST(OptimizerChunks, TheQuadsOfAChunkAreItsElements) {
  std::vector<int> owners(elements_per_chunk);
  for (int step = 0; step < quads_per_thread; ++step) {
    for (int thread = 0; thread < optimizer_threads; ++thread) {
      for (int i = 0; i < elements_per_quad; ++i) {
        ++owners[static_cast<std::size_t>(quad_of_thread(step, thread) + i)];
      }
    }
  }
  EXPECT_EQ(owners, std::vector<int>(elements_per_chunk, 1));
}

TEST(OptimizerChunks, TheQuadsOfAWarpAreItsBlock) {
  std::vector<int> owners(state_block_size);
  for (int q = 0; q < quads_per_lane; ++q) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < elements_per_quad; ++i) {
        ++owners[static_cast<std::size_t>(quad_of_lane(q, lane) + i)];
      }
    }
  }
  EXPECT_EQ(owners, std::vector<int>(state_block_size, 1));
}

}  // namespace
}  // namespace qlora::cuda
