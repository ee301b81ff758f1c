// Which lane of which warp owns which elements of a flattened weight, in the codec's kernels. Pure
// C++: the host tests prove that every element has exactly one owner.
//
//   chunk   what a lane moves by one 16-byte access of the dense tensor: 8 elements of a 16-bit
//           type or 4 of fp32, which are 4 or 2 bytes of codes. A block (32 elements at least)
//           is whole chunks.
//   step    32 consecutive chunks, one a lane
//   tile    consecutive steps, owned by one warp:
//
//           |<------------- step 0 ------------>|<------------- step 1 ------------>| ...
//   tile t  | lane 0 | lane 1 | ...... | lane 31 | lane 0 | lane 1 | ...... | lane 31 |
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

#include "format/nf4_layout.h"

namespace qlora::cuda {

inline constexpr int lanes_per_step = 32;
inline constexpr int warps_per_thread_block = 8;
inline constexpr int threads_per_thread_block = lanes_per_step * warps_per_thread_block;

// Enough to fill any GPU some 50 times over (a B200 holds 148 * 8 thread blocks of this size), so
// that the last ones to finish cost little; what is beyond it goes round the kernel's loop.
inline constexpr std::int64_t max_thread_blocks = 65535;

// A warp loads its whole tile before it works on it. Dequantising reads 4 bytes of codes a lane and
// step, quantising 16 bytes of w: with these tiles an SM at three quarters of its threads has 24 KB
// or more on their way, which hides the latency of HBM.
inline constexpr int dequantize_steps_per_tile = 4;
inline constexpr int quantize_steps_per_tile = 2;

template <typename T>
inline constexpr int elements_per_chunk = 16 / static_cast<int>(sizeof(T));

template <typename T>
inline constexpr int elements_per_step = lanes_per_step * elements_per_chunk<T>;

/// A lane's chunk. It begins at element chunk * elements_per_chunk<T>, and at byte 16 * chunk of
/// the dense tensor.
QLORA_HOST_DEVICE constexpr std::int64_t chunk_of(std::int64_t tile, int steps_per_tile, int step,
                                                  int lane) {
  return (tile * steps_per_tile + step) * lanes_per_step + lane;
}

template <typename T>
QLORA_HOST_DEVICE constexpr std::int64_t tile_count(std::int64_t element_count,
                                                    int steps_per_tile) {
  return ceil_divide(element_count, std::int64_t{steps_per_tile} * elements_per_step<T>);
}

/// Where element `i` of a chunk has its code in the chunk's code bytes, read as one little-endian
/// word.
QLORA_HOST_DEVICE constexpr int code_shift(int i) { return 8 * (i / 2) + (i % 2 == 0 ? 4 : 0); }

/// A chunk's block is chunk >> chunks_per_block_log2.
template <typename T>
constexpr int chunks_per_block_log2(std::int64_t block_size) {
  return std::countr_zero(static_cast<std::uint64_t>(block_size / elements_per_chunk<T>));
}

/// Quantising: lanes that share a block no longer than a step. A longer one is a warp's, and is its
/// tile.
template <typename T>
constexpr int lanes_per_block(std::int64_t block_size) {
  return static_cast<int>(block_size) / elements_per_chunk<T>;
}

/// Thread blocks for a kernel whose warps take a tile each.
constexpr unsigned thread_blocks_for_tiles(std::int64_t tiles) {
  return static_cast<unsigned>(
      std::min(ceil_divide(tiles, warps_per_thread_block), max_thread_blocks));
}

/// Thread blocks for a kernel whose threads take an item each.
constexpr unsigned thread_blocks_for_items(std::int64_t items, int threads) {
  return static_cast<unsigned>(std::min(ceil_divide(items, threads), max_thread_blocks));
}

}  // namespace qlora::cuda
