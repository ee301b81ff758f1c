// Every element of a weight has exactly one owner among the lanes of the codec's kernels, and each
// nibble one place in its word.
#include "cuda/nf4_codec_map.h"

#include <set>
#include <vector>

#include <gtest/gtest.h>

#include "format/float16.h"

namespace qlora::cuda {
namespace {

/// How often the lanes of all tiles own each element, and whether a chunk is ever cut by the end of
/// a block.
template <typename T>
std::vector<int> count_owners(std::int64_t element_count, int steps_per_tile) {
  std::vector<int> owners(static_cast<std::size_t>(element_count));
  for (std::int64_t tile = 0; tile < tile_count<T>(element_count, steps_per_tile); ++tile) {
    for (int step = 0; step < steps_per_tile; ++step) {
      for (int lane = 0; lane < lanes_per_step; ++lane) {
        for (int i = 0; i < elements_per_chunk<T>; ++i) {
          const std::int64_t e =
              chunk_of(tile, steps_per_tile, step, lane) * elements_per_chunk<T> + i;
          EXPECT_GE(e, 0);
          if (e < element_count) ++owners[static_cast<std::size_t>(e)];
        }
      }
    }
  }
  return owners;
}

template <typename T>
class NF4CodecMap : public testing::Test {};
using ElementTypes = testing::Types<float, BFloat16, Float16>;
TYPED_TEST_SUITE(NF4CodecMap, ElementTypes);

TYPED_TEST(NF4CodecMap, GivesEveryElementOneOwner) {
  for (const std::int64_t count : {1, 7, 8, 9, 511, 512, 513, 1024, 5000, 8517}) {
    const std::vector<int> once(static_cast<std::size_t>(count), 1);
    for (const int steps : {1, 2, 4, 16, 32}) {
      EXPECT_EQ(count_owners<TypeParam>(count, steps), once) << count << " elements, " << steps;
    }
  }
}

TYPED_TEST(NF4CodecMap, GivesAChunkOneBlock) {
  for (std::int64_t block_size = nf4_min_block_size; block_size <= nf4_max_block_size;
       block_size *= 2) {
    for (std::int64_t e = 0; e < 3 * block_size; ++e) {
      const std::int64_t chunk = e / elements_per_chunk<TypeParam>;
      ASSERT_EQ(chunk >> chunks_per_block_log2<TypeParam>(block_size), e / block_size)
          << "element " << e << ", block_size " << block_size;
    }
  }
}

TYPED_TEST(NF4CodecMap, GivesLanesThatShareABlockWholeBlocks) {
  for (std::int64_t size = nf4_min_block_size; size <= elements_per_step<TypeParam>; size *= 2) {
    const int lanes = lanes_per_block<TypeParam>(size);
    EXPECT_EQ(lanes * elements_per_chunk<TypeParam>, size);
    EXPECT_EQ(lanes_per_step % lanes, 0);
  }
}

TYPED_TEST(NF4CodecMap, ReadsAChunkOfCodesAsTheFormatOrdersItsNibbles) {
  // Elements 0, 1, ... have the codes 0, 1, ...
  std::uint8_t bytes[4];
  for (std::uint8_t i = 0; i < 4; ++i) {
    bytes[i] = nf4_pack(static_cast<std::uint8_t>(2 * i), static_cast<std::uint8_t>(2 * i + 1));
  }
  const std::uint32_t word = bytes[0] | bytes[1] << 8 | bytes[2] << 16 | bytes[3] << 24;
  for (int i = 0; i < elements_per_chunk<TypeParam>; ++i) {
    EXPECT_EQ(word >> code_shift(i) & 15, nf4_code_at(bytes, i));
  }
}

TEST(NF4CodecGrid, HasAThreadBlockForAllTilesUpToItsLimit) {
  EXPECT_EQ(thread_blocks_for_tiles(1), 1u);
  EXPECT_EQ(thread_blocks_for_tiles(warps_per_thread_block), 1u);
  EXPECT_EQ(thread_blocks_for_tiles(warps_per_thread_block + 1), 2u);
  EXPECT_EQ(thread_blocks_for_tiles(std::int64_t{1} << 40), max_thread_blocks);
  EXPECT_EQ(thread_blocks_for_items(257, 256), 2u);
  EXPECT_EQ(thread_blocks_for_items(std::int64_t{1} << 40, 32), max_thread_blocks);
}

}  // namespace
}  // namespace qlora::cuda
