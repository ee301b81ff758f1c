// In the tensor-core kernel for the middle every weight, token and output has one owner, every place
// in shared memory one tenant, and no access of a warp goes to a bank twice.
#include "cuda/nf4_matmul_tiles_map.h"

#include <algorithm>
#include <map>
#include <set>
#include <vector>

#include <gtest/gtest.h>

namespace qlora::cuda::tiles {
namespace {

/// How many clocks of shared memory an access of a warp takes beyond what its bytes need: lanes take
/// turns in groups that fill the 128 bytes of the banks once, and within a group each bank serves
/// one word.
int count_conflicts(const std::vector<int>& bytes_at, int width) {
  const std::size_t lanes = width <= 4 ? 32 : 128 / static_cast<std::size_t>(width);
  int conflicts = 0;
  for (std::size_t first = 0; first < bytes_at.size(); first += lanes) {
    std::map<int, std::set<int>> words_of_bank;
    for (std::size_t lane = first; lane < first + lanes; ++lane) {
      for (int byte = bytes_at[lane]; byte < bytes_at[lane] + width; ++byte) {
        words_of_bank[byte / 4 % 32].insert(byte / 4);
      }
    }
    std::size_t turns = 1;
    for (const auto& [bank, words] : words_of_bank) turns = std::max(turns, words.size());
    conflicts += static_cast<int>(turns) - 1;
  }
  return conflicts;
}

/// The bytes where the lanes of a warp access.
template <typename At>
std::vector<int> of_lanes(At&& at) {
  std::vector<int> out;
  for (int lane = 0; lane < 32; ++lane) out.push_back(at(lane));
  return out;
}

TEST(BankConflicts, AreCounted) {
  EXPECT_EQ(count_conflicts(of_lanes([](int lane) { return 4 * lane; }), 4), 0);
  EXPECT_EQ(count_conflicts(of_lanes([](int) { return 0; }), 4), 0);
  EXPECT_EQ(count_conflicts(of_lanes([](int lane) { return 8 * lane; }), 4), 1);
  EXPECT_EQ(count_conflicts(of_lanes([](int lane) { return 128 * lane; }), 4), 31);
  EXPECT_EQ(count_conflicts(of_lanes([](int lane) { return 16 * lane; }), 16), 0);
  EXPECT_EQ(count_conflicts(of_lanes([](int lane) { return 128 * lane; }), 16), 4 * 7);
}

TEST(NF4MatmulTilesMap, GivesEveryWeightOfAWarpsStageOneRegister) {
  std::map<std::pair<int, int>, int> owners;  // of (column, reduced)
  for (int lane = 0; lane < 32; ++lane) {
    for (int half = 0; half < 2; ++half) {
      for (int step = 0; step < 2; ++step) {
        for (int tile = 0; tile < 2; ++tile) {
          for (int r = 0; r < 4; ++r) {
            for (int i = 0; i < 2; ++i) {
              ++owners[{column_of(lane, slot_of(tile, r)),
                        reduced_of(lane, half, first_element(step, r) + i)}];
            }
          }
        }
      }
    }
  }
  EXPECT_EQ(owners.size(), static_cast<std::size_t>(columns_per_warp * reduced_per_stage));
  for (const auto& [at, count] : owners) {
    EXPECT_EQ(count, 1);
    EXPECT_TRUE(at.first >= 0 && at.first < columns_per_warp);
    EXPECT_TRUE(at.second >= 0 && at.second < reduced_per_stage);
  }
}

// mma.m16n8k16 multiplies A's element (row, k) with B's (k, column). By the PTX manual, register r of
// A holds row lane / 4 + 8 (r % 2) and k 2 (lane % 4) + 8 (r / 2), and register r of B holds column
// lane / 4 and k 2 (lane % 4) + 8 r; each also the next k. So what A and B mean by a k must agree, and
// must not depend on the row or column.
TEST(NF4MatmulTilesMap, GivesBothOperandsOfAnMmaTheSameReducedIndices) {
  for (int half = 0; half < 2; ++half) {
    for (int step = 0; step < 2; ++step) {
      std::map<int, std::set<int>> reduced_of_k, column_of_row[2];
      for (int lane = 0; lane < 32; ++lane) {
        for (int i = 0; i < 2; ++i) {
          for (int r = 0; r < 4; ++r) {
            const int k = 2 * (lane % 4) + 8 * (r / 2) + i, row = lane / 4 + 8 * (r % 2);
            reduced_of_k[k].insert(reduced_of(lane, half, first_element(step, r) + i));
            for (int tile = 0; tile < 2; ++tile) {
              column_of_row[tile][row].insert(column_of(lane, slot_of(tile, r)));
            }
          }
          for (int r = 0; r < 2; ++r) {
            // B's words 2 step and 2 step + 1 of the lane's chunk of 8 elements.
            const int k = 2 * (lane % 4) + 8 * r + i;
            reduced_of_k[k].insert(8 * token_chunk_of(lane, half) + 2 * (2 * step + r) + i);
          }
        }
      }
      EXPECT_EQ(reduced_of_k.size(), 16u);
      for (const auto& [k, indices] : reduced_of_k) EXPECT_EQ(indices.size(), 1u) << k;
      for (const auto& columns : column_of_row) {
        EXPECT_EQ(columns.size(), 16u);
        for (const auto& [row, set] : columns) EXPECT_EQ(set.size(), 1u) << row;
      }
    }
  }
}

// By the PTX manual, element i of D is row lane / 4 + 8 (i / 2) and column 2 (lane % 4) + i % 2. The
// kernel stores element i % 2 + 2 (slot % 2) of mma tile slot / 2 to the column of `slot`.
TEST(NF4MatmulTilesMap, StoresASumToTheColumnOfItsOperand) {
  for (int lane = 0; lane < 32; ++lane) {
    for (int slot = 0; slot < slots_per_lane; ++slot) {
      const int row = lane / 4 + 8 * (slot % 2);
      for (int other = 0; other < 32; ++other) {
        for (int r = 0; r < 4; ++r) {
          if (other / 4 + 8 * (r % 2) != row) continue;
          EXPECT_EQ(column_of(other, slot_of(slot / 2, r)), column_of(lane, slot));
        }
      }
    }
  }
}

TEST(NF4MatmulTilesMap, GivesEveryChunkOfTokensAPlaceOfItsOwn) {
  for (const int tokens : {64, 128}) {
    std::set<int> positions;
    for (int token = 0; token < tokens; ++token) {
      for (int c = 0; c < chunks_per_token; ++c) positions.insert(token_chunk_position(token, c));
    }
    EXPECT_EQ(positions.size(), static_cast<std::size_t>(tokens * chunks_per_token));
    EXPECT_EQ(*positions.begin(), 0);
    EXPECT_EQ(16 * (*positions.rbegin() + 1), token_bytes_per_stage(tokens));
  }
}

TEST(NF4MatmulTilesMap, CopiesAndReadsTokensWithoutBankConflicts) {
  for (int first = 0; first < 128; first += 4) {  // a warp copies the 8 chunks of 4 tokens
    EXPECT_EQ(count_conflicts(of_lanes([&](int lane) {
                                return 16 * token_chunk_position(first + lane / 8, lane % 8);
                              }),
                              16),
              0);
  }
  for (int first = 0; first < 128; first += tokens_per_mma) {
    for (int half = 0; half < 2; ++half) {
      const auto at = [&](int lane) {
        return 16 * token_chunk_position(first + lane / 4, token_chunk_of(lane, half));
      };
      EXPECT_EQ(count_conflicts(of_lanes(at), 16), 0);
      for (int lane = 0; lane < 32; ++lane) {  // the kernel adds the two parts of an address
        EXPECT_EQ(at(lane), 16 * (token_chunk_position(lane / 4, token_chunk_of(lane, half)) +
                                  token_chunk_position(first, 0)));
      }
    }
  }
}

template <Direction direction>
void expect_every_weight_chunk_once(int rows, int groups) {
  std::set<std::pair<int, int>> chunks;
  std::set<int> scales;
  for (int position = 0; position < weight_chunks_per_stage; ++position) {
    const WeightChunk chunk = weight_chunk_at<direction>(position);
    EXPECT_TRUE(chunk.row >= 0 && chunk.row < rows);
    EXPECT_TRUE(chunk.group >= 0 && chunk.group < groups);
    chunks.insert({chunk.row, chunk.group});
    const int scale = scale_at<direction>(position);
    EXPECT_TRUE(scale >= 0 && scale < weight_chunks_per_stage);
    scales.insert(scale);
  }
  EXPECT_EQ(chunks.size(), static_cast<std::size_t>(rows * groups));
  EXPECT_EQ(scales.size(), chunks.size());
}

TEST(NF4MatmulTilesMap, GivesEveryChunkOfTheWeightAPlaceOfItsOwn) {
  expect_every_weight_chunk_once<Direction::forward>(columns_per_tile, 2);
  expect_every_weight_chunk_once<Direction::grad_input>(reduced_per_stage, 4);
}

TEST(NF4MatmulTilesMap, ReadsForwardTheCodesAndScalesOfTheLanesColumns) {
  for (int warp = 0; warp < warp_count; ++warp) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int slot = 0; slot < slots_per_lane; ++slot) {
        const int byte = forward_codes_at(warp, lane, slot);
        EXPECT_EQ(byte % 8, 0);
        const int position = byte / bytes_per_weight_chunk;
        const WeightChunk chunk = weight_chunk_at<Direction::forward>(position);
        EXPECT_EQ(chunk.row, columns_per_warp * warp + column_of(lane, slot));
        EXPECT_EQ(weights_per_chunk * chunk.group + byte % bytes_per_weight_chunk * 2,
                  reduced_of(lane, 0, 0));
        EXPECT_EQ(scale_at<Direction::forward>(position), forward_scale_at(warp, lane, slot));
      }
    }
    for (int slot = 0; slot < slots_per_lane; ++slot) {
      EXPECT_EQ(count_conflicts(
                    of_lanes([&](int lane) { return forward_codes_at(warp, lane, slot); }), 8),
                0);
      EXPECT_EQ(count_conflicts(
                    of_lanes([&](int lane) { return 4 * forward_scale_at(warp, lane, slot); }), 4),
                0);
    }
  }
}

TEST(NF4MatmulTilesMap, ReadsInTheGradientTheCodesAndScalesOfTheLanesRows) {
  for (int warp = 0; warp < warp_count; ++warp) {
    for (int half = 0; half < 2; ++half) {
      for (int e = 0; e < reduced_per_half; ++e) {
        const auto at = [&](int lane) { return grad_codes_at(warp, lane, half, e); };
        for (int lane = 0; lane < 32; ++lane) {
          const int position = at(lane) / bytes_per_weight_chunk;
          const WeightChunk chunk = weight_chunk_at<Direction::grad_input>(position);
          EXPECT_EQ(chunk.row, reduced_of(lane, half, e));
          EXPECT_EQ(weights_per_chunk * chunk.group + at(lane) % bytes_per_weight_chunk * 2,
                    columns_per_warp * warp + column_of(lane, 0));
          EXPECT_EQ(scale_at<Direction::grad_input>(position),
                    grad_scales_at(warp, lane, 2 * half + e / 4) + e % 4);
        }
        EXPECT_EQ(count_conflicts(of_lanes(at), 2), 0);
      }
    }
    for (int four = 0; four < 4; ++four) {
      const auto at = [&](int lane) { return 4 * grad_scales_at(warp, lane, four); };
      EXPECT_EQ(count_conflicts(of_lanes(at), 16), 0);
      for (int lane = 0; lane < 32; ++lane) EXPECT_EQ(at(lane) % 16, 0);
    }
  }
}

TEST(NF4MatmulTilesMap, StoresTheWeightWithoutBankConflicts) {
  for (int first = 0; first < weight_chunks_per_stage; first += 32) {
    EXPECT_EQ(count_conflicts(
                  of_lanes([&](int lane) { return bytes_per_weight_chunk * (first + lane); }), 16),
              0);
    EXPECT_EQ(
        count_conflicts(
            of_lanes([&](int lane) { return 4 * scale_at<Direction::forward>(first + lane); }), 4),
        0);
    EXPECT_EQ(count_conflicts(of_lanes([&](int lane) {
                                return 4 * scale_at<Direction::grad_input>(first + lane);
                              }),
                              4),
              0);
  }
}

TEST(NF4MatmulTilesMap, FitsTheSharedMemoryOfTheSmallestDevice) {
  EXPECT_EQ(shared_bytes(64), 47104);
  EXPECT_EQ(shared_bytes(128), 71680);
}

}  // namespace
}  // namespace qlora::cuda::tiles
