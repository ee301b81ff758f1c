// Who owns what in the tensor-core kernel for the middle (nf4_matmul_tiles.cuh), and where it lies
// in shared memory. Pure C++: host tests prove the maps bijective and in range, and count bank
// conflicts.
//
// A thread block computes the transposed output: 128 columns (n forward, k in the gradient) by 64
// or 128 tokens, in stages of 64 of the reduced index (k forward, n in the gradient). Of its 4 warps
// each owns 32 columns and all tokens, so that a weight is decoded by one lane, straight into the A
// operand, and is used for every token of the thread block.
//
// Which column and which reduced index an operand's register stands for is ours to choose, as long
// as A and B agree. With group = lane / 4 and pair = lane % 4 a lane owns
//
//   columns   4 group + 0, 1, 2, 3    so that it stores 4 neighbours of the output
//   reduced   16 pair + 0 ... 15      so that B is two reads of 16 bytes, and A forward a read of 8
//
// in two halves of 8 reduced indices, each two steps of mma.m16n8k16:
//
//   element    0  1  2  3 | 4  5  6  7        of a half
//   register   b0    b1   | b0    b1          of B
//              a0    a2   | a0    a2          of A, slots 0 and 2 (rows 0 to 7 of the two mma tiles)
//              a1    a3   | a1    a3          of A, slots 1 and 3 (rows 8 to 15)
//   step          0       |     1
#pragma once

#include "cuda/nf4_matmul.h"
#include "format/host_device.h"

namespace qlora::cuda::tiles {

inline constexpr int warp_count = 4;
inline constexpr int thread_count = 32 * warp_count;
inline constexpr int columns_per_warp = 32;
inline constexpr int columns_per_tile = warp_count * columns_per_warp;
inline constexpr int reduced_per_stage = 64;
inline constexpr int reduced_per_lane = 16;
inline constexpr int reduced_per_half = 8;
inline constexpr int slots_per_lane = 4;  // columns
inline constexpr int tokens_per_mma = 8;

// Tokens are copied two stages ahead of their product. The weight's stages run one ahead of the
// tokens': the first half of a stage is decoded during the products of the stage before.
inline constexpr int token_stages = 3;
inline constexpr int weight_stages = 4;

// ---- operands

/// The column that a lane's slot (0 to 3) stands for, of the 32 of its warp.
QLORA_HOST_DEVICE constexpr int column_of(int lane, int slot) { return 4 * (lane / 4) + slot; }

/// The reduced index that element `e` (0 to 7) of a half stands for, of the 64 of a stage.
QLORA_HOST_DEVICE constexpr int reduced_of(int lane, int half, int e) {
  return reduced_per_lane * (lane % 4) + reduced_per_half * half + e;
}

/// Register `r` of A in a step holds elements first_element(step, r) and the next, of slot
/// slot_of(mma_tile, r).
QLORA_HOST_DEVICE constexpr int first_element(int step, int r) { return 4 * step + r / 2 * 2; }
QLORA_HOST_DEVICE constexpr int slot_of(int mma_tile, int r) { return 2 * mma_tile + r % 2; }

// ---- tokens in shared memory: rows of 128 bytes, in chunks of 16

inline constexpr int chunks_per_token = reduced_per_stage / 8;

/// Where chunk `c` of a token is, in units of 16 bytes. Eight lanes that read the same or the
/// neighbouring chunk of different tokens read different banks.
QLORA_HOST_DEVICE constexpr int token_chunk_position(int token, int c) {
  return chunks_per_token * token + (c ^ (token % 8));
}

/// The chunk of B that a lane reads for a half: its 8 elements in order.
QLORA_HOST_DEVICE constexpr int token_chunk_of(int lane, int half) { return 2 * (lane % 4) + half; }

// ---- the weight in shared memory: chunks of 32 neighbours along k, which share a scale

inline constexpr int weights_per_chunk = 32;
inline constexpr int bytes_per_weight_chunk = weights_per_chunk / 2;
inline constexpr int weight_chunks_per_stage =
    columns_per_tile * reduced_per_stage / weights_per_chunk;
inline constexpr int weight_chunks_per_thread = weight_chunks_per_stage / thread_count;

/// A chunk of a stage's weight tile: row `row` (n) and weights 32 `group` ... 32 `group` + 31 (k).
/// The tile is 128 rows of 2 groups forward, 64 rows of 4 groups in the gradient.
struct WeightChunk {
  int row, group;
};

/// The chunk at a position, in units of 16 bytes.
///
///   forward     the 8 groups of lanes read a slot from 8 consecutive rows of shared memory
///   gradient    the 4 pairs of lanes read from rows 16 apart, each from other banks
template <Direction direction>
QLORA_HOST_DEVICE constexpr WeightChunk weight_chunk_at(int position) {
  if constexpr (direction == Direction::forward) {
    const int row = position / 2;  // slot-major within a warp's 32
    return {row / 32 * 32 + 4 * (row % 8) + row % 32 / 8, position % 2};
  } else {
    const int row = position / 4;
    return {row, (position % 4) ^ (row / reduced_per_lane)};
  }
}

/// Forward: the byte where a lane's 16 codes of the column of `slot` begin, 8 bytes.
QLORA_HOST_DEVICE constexpr int forward_codes_at(int warp, int lane, int slot) {
  return 32 * (columns_per_warp * warp + 8 * slot + lane / 4) + 8 * (lane % 4);
}

/// Gradient: the byte where a lane's 4 codes of element `e` of a half begin, 2 bytes.
QLORA_HOST_DEVICE constexpr int grad_codes_at(int warp, int lane, int half, int e) {
  return 16 * (4 * reduced_of(lane, half, e) + (warp ^ (lane % 4))) + 2 * (lane / 4);
}

/// Where the scale of a chunk is, among 256 fp32.
template <Direction direction>
QLORA_HOST_DEVICE constexpr int scale_at(int position) {
  if constexpr (direction == Direction::forward) {
    return position;
  } else {
    const WeightChunk chunk = weight_chunk_at<direction>(position);
    const int pair = chunk.row / 16, four = chunk.row % 16 / 4;
    return 64 * chunk.group + ((16 * pair + 4 * (four ^ pair) + chunk.row % 4) ^ 8 * chunk.group);
  }
}

/// Forward: the scale of a lane's codes of the column of `slot`.
QLORA_HOST_DEVICE constexpr int forward_scale_at(int warp, int lane, int slot) {
  return 2 * (columns_per_warp * warp + 8 * slot + lane / 4) + lane % 4 / 2;
}

/// Gradient: the scales of elements 4 `four` ... 4 `four` + 3 of a lane's 16, 16 bytes.
QLORA_HOST_DEVICE constexpr int grad_scales_at(int warp, int lane, int four) {
  const int pair = lane % 4;
  return 64 * warp + ((16 * pair + 4 * (four ^ pair)) ^ 8 * warp);
}

// ---- shared memory

inline constexpr int level_table_bytes = 16 * 32 * 4;
inline constexpr int codes_bytes_per_stage = bytes_per_weight_chunk * weight_chunks_per_stage;
inline constexpr int scales_bytes_per_stage = 4 * weight_chunks_per_stage;

inline constexpr int codes_begin = level_table_bytes;
inline constexpr int scales_begin = codes_begin + weight_stages * codes_bytes_per_stage;
inline constexpr int tokens_begin = scales_begin + weight_stages * scales_bytes_per_stage;

constexpr int token_bytes_per_stage(int tokens) { return 16 * chunks_per_token * tokens; }

constexpr int shared_bytes(int tokens) {
  return tokens_begin + token_stages * token_bytes_per_stage(tokens);
}

static_assert(tokens_begin % 128 == 0);
static_assert(shared_bytes(128) <= 99 * 1024);  // compute capability 8.6, 8.9 and 12.0

}  // namespace qlora::cuda::tiles
