// Who owns what in the kernels for few tokens. Pure C++: the host tests prove that every weight meets
// every token once.
//
// mma.m16n8k16 has 16 rows of the weight's side, 8 tokens, and 16 terms of the sum (mma.cuh draws
// its fragments). A lane is (group, pair) = (lane / 4, lane % 4). The order of terms in a sum is free
// as long as both operands share it, and so is the order of rows as long as the output is stored by
// it; both are chosen so that a lane's load of codes is what it multiplies itself.
//
//   forward      rows are rows of W, terms are columns. A lane loads 16 bytes, 32 columns, of rows
//                `group` and `group + 8`:
//
//                    columns  |<--- pair 0: 32 --->|<--- pair 1 --->|<--- pair 2 --->|<--- pair 3 --->|
//
//                Step s of 8 takes its columns 4 s to 4 s + 3: terms 2 pair, +1, 2 pair + 8, +9.
//
//   grad_input   rows are columns of W, terms are its rows. A lane loads 8 (or 4) bytes of rows
//                4 pair to 4 pair + 3, which are terms 2 pair, +1, 2 pair + 8, +9; group g has the
//                columns next to those of g - 1. Step s takes byte s of each: its even column is row
//                `group`, its odd one row `group + 8`.
#pragma once

#include <cstdint>

#include "cuda/nf4_matmul.h"
#include "format/nf4_layout.h"

namespace qlora::cuda {

inline constexpr int few_tokens_warps = 8;
inline constexpr int few_tokens_threads = 32 * few_tokens_warps;
inline constexpr int tokens_per_mma = 8;
inline constexpr int rows_per_mma = 16;
inline constexpr int terms_per_mma = 16;

// The sums of 4 tiles of tokens fill 32 (forward) or 64 (grad_input) of a lane's registers.
inline constexpr int max_token_tiles = 4;
inline constexpr std::int64_t nf4_max_few_tokens = max_token_tiles * tokens_per_mma;

// The pairs of levels of all bytes of codes, in 16 copies: 8 bytes each, so that the lanes of half a
// warp, which read their own copy, use all 32 banks.
inline constexpr int level_pair_copies = 16;
inline constexpr int level_pair_bytes = 256 * level_pair_copies * 8;

/// 1, 2 or 4.
constexpr int token_tiles_for(std::int64_t m) {
  return m <= tokens_per_mma ? 1 : m <= 2 * tokens_per_mma ? 2 : 4;
}

// ---- forward

inline constexpr int forward_columns_per_lane = 32;
inline constexpr int forward_columns_per_unit = 128;  // a unit of work: a warp's columns at a time
inline constexpr int forward_steps_per_unit = 8;

/// Fragments of 16 rows of W a warp: two where tokens are many, since each x that it loads serves both.
QLORA_HOST_DEVICE constexpr int forward_fragments(int token_tiles) {
  return token_tiles == 1 ? 1 : 2;
}

QLORA_HOST_DEVICE constexpr int forward_rows(int token_tiles) {
  return rows_per_mma * forward_fragments(token_tiles);
}

/// Units whose codes a warp has on their way, so that a multiprocessor has 32 KB or more.
QLORA_HOST_DEVICE constexpr int forward_stages(int token_tiles) {
  return 4 / forward_fragments(token_tiles);
}

/// The first of a lane's columns in a unit.
QLORA_HOST_DEVICE constexpr int forward_column(int lane) {
  return lane % 4 * forward_columns_per_lane;
}

// ---- grad_input

inline constexpr int grad_rows_per_lane = 4;
inline constexpr int grad_rows_per_unit = 16;

/// Of each row: as many as the registers have sums for, 4 a byte and tile of tokens.
QLORA_HOST_DEVICE constexpr int grad_bytes_per_lane(int token_tiles) {
  return token_tiles == 4 ? 4 : 8;
}

QLORA_HOST_DEVICE constexpr int grad_columns_per_lane(int token_tiles) {
  return 2 * grad_bytes_per_lane(token_tiles);
}

QLORA_HOST_DEVICE constexpr int grad_columns(int token_tiles) {
  return 8 * grad_columns_per_lane(token_tiles);
}

/// As forward_stages, but what the sums leave of the registers is the limit: 64, 32 and 24 KB.
QLORA_HOST_DEVICE constexpr int grad_stages(int token_tiles) {
  return token_tiles == 1 ? 4 : token_tiles == 2 ? 2 : 3;
}

// ---- scales
//
// Lanes whose columns are in one block, if blocks and rows are long enough, load one scale each of
// several rows and exchange them.
//
//   forward      the two lanes of 64 columns: pair 2 i has the even ones of their rows
//   grad_input   the four groups of 4 * grad_columns_per_lane columns: group 4 i + r has row r

/// Columns, from a multiple of this on, that share their scales.
QLORA_HOST_DEVICE constexpr int columns_per_scale(Direction direction, int token_tiles) {
  return direction == Direction::forward ? 2 * forward_columns_per_lane
                                         : 4 * grad_columns_per_lane(token_tiles);
}

QLORA_HOST_DEVICE constexpr int forward_scale_owner(int lane, int row) {
  return lane - lane % 2 + row % 2;
}

QLORA_HOST_DEVICE constexpr int grad_scale_owner(int lane, int row) {
  return lane - lane % 16 + 4 * row + lane % 4;
}

// ---- both

/// Columns of the output that a thread block owns.
constexpr int few_tokens_columns(Direction direction, int token_tiles) {
  return direction == Direction::forward ? forward_rows(token_tiles) : grad_columns(token_tiles);
}

/// Terms of a sum that a warp takes at a time.
constexpr int few_tokens_terms_per_unit(Direction direction) {
  return direction == Direction::forward ? forward_columns_per_unit : grad_rows_per_unit;
}

/// Sums that a lane holds.
QLORA_HOST_DEVICE constexpr int few_tokens_sums(Direction direction, int token_tiles) {
  return direction == Direction::forward ? 4 * token_tiles * forward_fragments(token_tiles)
                                         : 4 * token_tiles * grad_bytes_per_lane(token_tiles);
}

/// Thread blocks that a multiprocessor holds at a time: of 65536 registers, 256 threads take 128
/// each, but for one kernel, which needs some more.
QLORA_HOST_DEVICE constexpr int few_tokens_resident_blocks(Direction direction, int token_tiles) {
  return direction == Direction::forward && token_tiles == 4 ? 1 : 2;
}

/// Half the warps leave their sums in shared memory at a time, where the table of levels was.
constexpr int few_tokens_shared_bytes(Direction direction, int token_tiles) {
  const int sums = few_tokens_warps / 2 * 32 * 4 * few_tokens_sums(direction, token_tiles);
  return sums > level_pair_bytes ? sums : level_pair_bytes;
}

}  // namespace qlora::cuda
