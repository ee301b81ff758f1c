// The tensor-core kernel for a few tokens, the input's gradient. nf4_matmul_few_tokens.cu launches it; host
// tests run its body. nf4_matmul_few_tokens_map.h draws who owns what.
#pragma once

#include <algorithm>

#include "cuda/mma.cuh"
#include "cuda/nf4_matmul_few_tokens.cuh"

namespace qlora::cuda {

/// A unit of a lane's codes, on their way, with the scale that it loads for itself and others.
template <int words>
struct GradCodes {
  std::uint32_t codes[grad_rows_per_lane][words];
  AnyScaleReader::Stored scale;
};

template <int words>
__device__ void load_words_once(std::uint32_t (&to)[words], const std::uint8_t* address) {
  static_assert(words == 1 || words == 2);
  if constexpr (words == 2) {
    const auto value = load_once(reinterpret_cast<const std::uint64_t*>(address));
    to[0] = static_cast<std::uint32_t>(value);
    to[1] = static_cast<std::uint32_t>(value >> 32);
  } else {
    to[0] = load_once(reinterpret_cast<const std::uint32_t*>(address));
  }
}

/// What a warp does in nf4_few_tokens_grad_input_kernel.
template <typename T, int token_tiles>
class GradWarp {
 public:
  static constexpr int bytes = grad_bytes_per_lane(token_tiles);
  using Codes = GradCodes<bytes / 4>;

  __device__ GradWarp(const NF4FewTokensArguments<T>& a, int first_column)
      : a_(a),
        lane_(static_cast<int>(threadIdx.x) % lanes_per_warp),
        level_pairs_(lane_),
        scales_(a.scales) {
    // Columns and tokens beyond the last are read as if they were it; nobody stores their sums.
    const int columns = grad_columns_per_lane(token_tiles);
    const int column = std::min(first_column + lane_ / 4 * columns, a.k - columns);
    const std::uint64_t element = static_cast<std::uint64_t>(first_row(0)) * a.k + column;
    codes_ = a.codes + (element >> 1);
    first_chunk_ = static_cast<std::uint32_t>(element >> chunk_log2);
#pragma unroll
    for (int tile = 0; tile < token_tiles; ++tile) {
      const int token = std::min(tokens_per_mma * tile + lane_ / 4, a.m - 1);
      token_offset_[tile] = static_cast<std::uint32_t>(token * a.n + first_row(0));
    }
  }

  /// The unit's rows all exist, unless `is_full` is false.
  template <bool is_full>
  __device__ void load(Codes& to, int unit) const {
    const std::uint8_t* const from =
        codes_ + static_cast<std::uint64_t>(static_cast<std::uint32_t>(unit)) *
                     static_cast<std::uint32_t>(grad_rows_per_unit / 2 * a_.k);
#pragma unroll
    for (int r = 0; r < grad_rows_per_lane; ++r) {
      if (is_full || first_row(unit) + r < a_.n) {
        load_words_once(to.codes[r], from + static_cast<std::uint32_t>(r * (a_.k / 2)));
      } else {
#pragma unroll
        for (std::uint32_t& word : to.codes[r]) word = 0;
      }
    }
    const int mine = lane_ / 4 % grad_rows_per_lane;
    to.scale = {};
    if (a_.shares_scales && (is_full || first_row(unit) + mine < a_.n)) {
      to.scale = scales_.load(block(mine, unit));
    }
  }

  template <bool is_full>
  __device__ void multiply(const Codes& weight, int unit,
                           float (&sums)[bytes][token_tiles][4]) const {
    std::uint32_t input[token_tiles][2];
#pragma unroll
    for (int tile = 0; tile < token_tiles; ++tile) load_input<is_full>(input[tile], tile, unit);
    float scales[grad_rows_per_lane];
    decode_scales<is_full>(weight, unit, scales);
    if constexpr (!is_full) __syncwarp();  // mma wants all lanes, also those without rows
#pragma unroll
    for (int byte = 0; byte < bytes; ++byte) {
      std::uint32_t fragment[4];
#pragma unroll
      for (int r = 0; r < grad_rows_per_lane; r += 2) {
        const LevelPair first = level_pairs_(weight.codes[r][byte / 4], byte % 4);
        const LevelPair second = level_pairs_(weight.codes[r + 1][byte / 4], byte % 4);
        fragment[r] = round_pair<T>(first.high * scales[r], second.high * scales[r + 1]);
        fragment[r + 1] = round_pair<T>(first.low * scales[r], second.low * scales[r + 1]);
      }
#pragma unroll
      for (int tile = 0; tile < token_tiles; ++tile) {
        multiply_accumulate<T>(sums[byte][tile], fragment, input[tile]);
      }
    }
  }

 private:
  __device__ int first_row(int unit) const {
    return unit * grad_rows_per_unit + lane_ % 4 * grad_rows_per_lane;
  }

  /// The quantisation block of the lane's columns in a row of a unit.
  __device__ std::uint32_t block(int r, int unit) const {
    const std::uint32_t chunks_per_row = static_cast<std::uint32_t>(a_.k) >> chunk_log2;
    const std::uint32_t chunk =
        first_chunk_ + static_cast<std::uint32_t>(unit * grad_rows_per_unit + r) * chunks_per_row;
    return chunk >> a_.chunks_per_block_log2;
  }

  /// dy of the lane's rows; 0 beyond the last.
  template <bool is_full>
  __device__ void load_input(std::uint32_t (&to)[2], int tile, int unit) const {
    const T* const from =
        a_.input + (token_offset_[tile] + static_cast<std::uint32_t>(unit) * grad_rows_per_unit);
    if (is_full && a_.is_input_aligned) {
      const auto four = *reinterpret_cast<const std::uint64_t*>(from);
      to[0] = static_cast<std::uint32_t>(four);
      to[1] = static_cast<std::uint32_t>(four >> 32);
      return;
    }
    to[0] = to[1] = 0;
#pragma unroll
    for (int i = 0; i < grad_rows_per_lane; ++i) {
      if (is_full || first_row(unit) + i < a_.n) {
        to[i / 2] |= std::uint32_t{from[i].bits} << 16 * (i % 2);
      }
    }
  }

  /// Of the lane's rows; 0 beyond the last, where dy is 0 too.
  template <bool is_full>
  __device__ void decode_scales(const Codes& weight, int unit,
                                float (&scales)[grad_rows_per_lane]) const {
    if (a_.shares_scales) {
      const float mine = scales_.decode(weight.scale);
#pragma unroll
      for (int r = 0; r < grad_rows_per_lane; ++r) {
        scales[r] = __shfl_sync(all_lanes, mine, grad_scale_owner(lane_, r));
      }
    }
#pragma unroll
    for (int r = 0; r < grad_rows_per_lane; ++r) {
      if (!is_full && first_row(unit) + r >= a_.n) {
        scales[r] = 0.0f;
      } else if (!a_.shares_scales) {
        scales[r] = scales_.decode(scales_.load(block(r, unit)));
      }
    }
  }

  const NF4FewTokensArguments<T>& a_;
  int lane_;
  LevelPairs level_pairs_;
  AnyScaleReader scales_;
  const std::uint8_t* codes_;  // of the lane's first row and column
  std::uint32_t first_chunk_;
  std::uint32_t token_offset_[token_tiles];
};

/// dx[m, k] = dy[m, n] · W: in fp32, rounded once to T.
///
///   T bf16 or fp16, m up to 8 * token_tiles, n any, k a multiple of 32, any block size
///   a thread block owns 128 (64 for four tiles of tokens) columns of W and every split-th unit of
///   8 x 16 rows, a warp every eighth of those
///   reads 0.516 B a weight past the caches, and dy, 2 m n bytes a thread block, from L2 and L1
///   32 KB of shared memory: the levels, then the sums of warps
///   preconditions: codes and their rows are aligned to 16 bytes, fp32 scales to 4
template <typename T, int token_tiles>
__global__ void __launch_bounds__(few_tokens_threads,
                                  few_tokens_resident_blocks(Direction::grad_input, token_tiles))
    nf4_few_tokens_grad_input_kernel(const NF4FewTokensArguments<T> a) {
  using Warp = GradWarp<T, token_tiles>;
  constexpr int bytes = Warp::bytes;
  constexpr int stages = grad_stages(token_tiles);
  const int thread = static_cast<int>(threadIdx.x);
  const int part = static_cast<int>(blockIdx.x) % a.split;
  const int first_column = static_cast<int>(blockIdx.x) / a.split * grad_columns(token_tiles);
  const Warp warp(a, first_column);

  float sums[bytes][token_tiles][4] = {};
  sum_units<stages>(warp,
                    {.first = part * few_tokens_warps + warp_index(thread),
                     .stride = few_tokens_warps * a.split,
                     .whole = a.n / grad_rows_per_unit,
                     .has_rest = a.n % grad_rows_per_unit != 0},
                    thread, sums);
  add_over_warps(sums, thread);
  if (thread >= lanes_per_warp) return;
  const int lane_column = first_column + thread / 4 * grad_columns_per_lane(token_tiles);
#pragma unroll
  for (int byte = 0; byte < bytes; ++byte) {
#pragma unroll
    for (int tile = 0; tile < token_tiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        store_sum(a, part, tokens_per_mma * tile + 2 * (thread % 4) + i % 2,
                  lane_column + 2 * byte + i / 2, a.k, sums[byte][tile][i]);
      }
    }
  }
}

}  // namespace qlora::cuda
