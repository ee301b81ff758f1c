// The tensor-core kernel for a few tokens, forward. nf4_matmul_few_tokens.cu launches it; host
// tests run its body. nf4_matmul_few_tokens_map.h draws who owns what.
#pragma once

#include <algorithm>

#include "cuda/mma.cuh"
#include "cuda/nf4_matmul_few_tokens.cuh"

namespace qlora::cuda {

/// A unit of a lane's codes, on their way, with the scales that it loads for itself and others.
template <int row_count>
struct ForwardCodes {
  Bytes16 codes[row_count];
  AnyScaleReader::Stored scales[row_count / 2];
};

/// What a warp does in nf4_few_tokens_forward_kernel.
template <typename T, int token_tiles>
class ForwardWarp {
 public:
  static constexpr int fragments = forward_fragments(token_tiles);
  static constexpr int row_count = 2 * fragments;  // of a lane: group, group + 8, …
  using Codes = ForwardCodes<row_count>;

  __device__ ForwardWarp(const NF4FewTokensArguments<T>& a, int first_row)
      : a_(a),
        lane_(static_cast<int>(threadIdx.x) % lanes_per_warp),
        level_pairs_(lane_),
        scales_(a.scales) {
    // Rows and tokens beyond the last are read as if they were it; nobody stores their sums.
    const std::uint64_t first_element = static_cast<std::uint64_t>(first_row) * a.k;
    codes_ = a.codes + (first_element >> 1);
    first_chunk_ = static_cast<std::uint32_t>(first_element >> chunk_log2);
#pragma unroll
    for (int r = 0; r < row_count; ++r) {
      const int row = std::min(8 * r + lane_ / 4, a.n - 1 - first_row);
      row_offset_[r] = static_cast<std::uint32_t>(row * a.k + forward_column(lane_));
    }
#pragma unroll
    for (int tile = 0; tile < token_tiles; ++tile) {
      const int token = std::min(tokens_per_mma * tile + lane_ / 4, a.m - 1);
      token_offset_[tile] = static_cast<std::uint32_t>(token * a.k + forward_column(lane_));
    }
  }

  /// The unit's columns all exist, unless `is_full` is false.
  template <bool is_full>
  __device__ void load(Codes& to, int unit) const {
    if (!is_full && !has_columns(unit)) {
      to = {};
      return;
    }
#pragma unroll
    for (int r = 0; r < row_count; ++r) {
      to.codes[r] =
          load_16_bytes_once(codes_ + (row_offset_[r] / 2 + static_cast<std::uint32_t>(unit) *
                                                                (forward_columns_per_unit / 2)));
    }
    if (!a_.shares_scales) return;
#pragma unroll
    for (int f = 0; f < fragments; ++f) {
      to.scales[f] =
          scales_.load(block(lane_ % 2 == 0 ? row_offset_[2 * f] : row_offset_[2 * f + 1], unit));
    }
  }

  template <bool is_full>
  __device__ void multiply(const Codes& weight, int unit,
                           float (&sums)[fragments][token_tiles][4]) const {
    float scales[row_count];
    decode_scales<is_full>(weight, unit, scales);
    const T* from[token_tiles];
#pragma unroll
    for (int tile = 0; tile < token_tiles; ++tile) {
      from[tile] = a_.input + (token_offset_[tile] +
                               static_cast<std::uint32_t>(unit) * forward_columns_per_unit);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // 8 columns, two steps
      Bytes16 input[token_tiles];
#pragma unroll
      for (int tile = 0; tile < token_tiles; ++tile) {
        input[tile] = is_full || has_columns(unit) ? load_16_bytes(from[tile] + 8 * i) : Bytes16{};
      }
      if constexpr (!is_full) __syncwarp();  // mma wants all lanes, also those without columns
#pragma unroll
      for (int step = 0; step < 2; ++step) {
#pragma unroll
        for (int f = 0; f < fragments; ++f) {
          std::uint32_t fragment[4];
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const int r = 2 * f + j % 2;
            const LevelPair pair = level_pairs_(weight.codes[r].words[i], 2 * step + j / 2);
            fragment[j] = round_pair<T>(pair.high * scales[r], pair.low * scales[r]);
          }
#pragma unroll
          for (int tile = 0; tile < token_tiles; ++tile) {
            const std::uint32_t x[2] = {input[tile].words[2 * step],
                                        input[tile].words[2 * step + 1]};
            multiply_accumulate<T>(sums[f][tile], fragment, x);
          }
        }
      }
    }
  }

 private:
  __device__ bool has_columns(int unit) const {
    return unit * forward_columns_per_unit + forward_column(lane_) < a_.k;
  }

  /// The quantisation block of a row's columns in a unit.
  __device__ std::uint32_t block(std::uint32_t row_offset, int unit) const {
    const std::uint32_t chunk =
        first_chunk_ + (row_offset >> chunk_log2) +
        static_cast<std::uint32_t>(unit) * (forward_columns_per_unit >> chunk_log2);
    return chunk >> a_.chunks_per_block_log2;
  }

  /// Of the lane's rows; 0 beyond the last column, where x is 0 too.
  template <bool is_full>
  __device__ void decode_scales(const Codes& weight, int unit, float (&scales)[row_count]) const {
#pragma unroll
    for (int f = 0; f < fragments; ++f) {
      if (a_.shares_scales) {
        const float mine = scales_.decode(weight.scales[f]);
        scales[2 * f] = __shfl_sync(all_lanes, mine, forward_scale_owner(lane_, 0));
        scales[2 * f + 1] = __shfl_sync(all_lanes, mine, forward_scale_owner(lane_, 1));
      } else if (is_full || has_columns(unit)) {
        scales[2 * f] = scales_.decode(scales_.load(block(row_offset_[2 * f], unit)));
        scales[2 * f + 1] = scales_.decode(scales_.load(block(row_offset_[2 * f + 1], unit)));
      }
      if (!is_full && !has_columns(unit)) scales[2 * f] = scales[2 * f + 1] = 0.0f;
    }
  }

  const NF4FewTokensArguments<T>& a_;
  int lane_;
  LevelPairs level_pairs_;
  AnyScaleReader scales_;
  // Of the thread block; offsets are in elements from there, or from the first token.
  const std::uint8_t* codes_;
  std::uint32_t first_chunk_;
  std::uint32_t row_offset_[row_count], token_offset_[token_tiles];
};

/// y[m, n] = x[m, k] · Wᵀ, + bias: in fp32, rounded once to T.
///
///   T bf16 or fp16, m up to 8 * token_tiles, n any, k a multiple of 32, any block size
///   a thread block owns 16 (one tile of tokens) or 32 rows of W and every split-th unit of 8 x 128
///   columns, a warp every eighth of those
///   reads 0.516 B a weight past the caches, and x, 2 m k bytes a thread block, from L2 and L1
///   32 KB of shared memory: the levels, then the sums of warps
///   preconditions: x, codes and their rows are aligned to 16 bytes, fp32 scales to 4
template <typename T, int token_tiles>
__global__ void __launch_bounds__(few_tokens_threads,
                                  few_tokens_resident_blocks(Direction::forward, token_tiles))
    nf4_few_tokens_forward_kernel(const NF4FewTokensArguments<T> a) {
  using Warp = ForwardWarp<T, token_tiles>;
  constexpr int fragments = Warp::fragments;
  constexpr int stages = forward_stages(token_tiles);
  const int thread = static_cast<int>(threadIdx.x);
  const int part = static_cast<int>(blockIdx.x) % a.split;
  const int first_row = static_cast<int>(blockIdx.x) / a.split * forward_rows(token_tiles);
  const Warp warp(a, first_row);

  float sums[fragments][token_tiles][4] = {};
  sum_units<stages>(warp,
                    {.first = part * few_tokens_warps + warp_index(thread),
                     .stride = few_tokens_warps * a.split,
                     .whole = a.k / forward_columns_per_unit,
                     .has_rest = a.k % forward_columns_per_unit != 0},
                    thread, sums);
  add_over_warps(sums, thread);
  if (thread >= lanes_per_warp) return;
#pragma unroll
  for (int f = 0; f < fragments; ++f) {
#pragma unroll
    for (int tile = 0; tile < token_tiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        store_sum(a, part, tokens_per_mma * tile + 2 * (thread % 4) + i % 2,
                  first_row + rows_per_mma * f + 8 * (i / 2) + thread / 4, a.n, sums[f][tile][i]);
      }
    }
  }
}

}  // namespace qlora::cuda
