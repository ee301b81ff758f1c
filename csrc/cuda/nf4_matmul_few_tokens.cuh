// The tensor-core kernels for a few tokens. nf4_matmul_few_tokens.cu launches them; host tests run
// their bodies. nf4_matmul_few_tokens_map.h draws who owns what.
//
// To read 4-bit weights as fast as an H200's memory gives them leaves some four instructions a weight.
// These kernels take 3.9 (forward, one tile of tokens, counted in the SASS for 9.0), 3 of them to
// decode: the codes are loaded as fragments, without a detour by shared memory; a byte of codes looks
// up both its levels at once (permute, multiply-add, load); two multiplications by the scale and one
// rounding make a register of a fragment, in the contract's numbers.
#pragma once

#include <algorithm>
#include <bit>

#include "cuda/mma.cuh"
#include "cuda/nf4_decode.cuh"
#include "cuda/nf4_matmul_few_tokens_map.h"
#include "cuda/shared_memory.cuh"

namespace qlora::cuda {

template <typename T>
struct NF4FewTokensArguments {
  const T* input;  // [m, terms]
  const std::uint8_t* codes;
  NF4Scales scales;
  const T* bias;    // [columns], or null
  T* output;        // [m, columns]
  float* partials;  // [split, m, columns]: in place of output where split > 1; else null
  int m, n, k;
  int split;
  int chunks_per_block_log2;
  bool shares_scales;     // columns_per_scale neighbours are of one block
  bool is_input_aligned;  // grad_input: four neighbours of dy are one aligned access
};

// ---- decoding

struct alignas(8) LevelPair {
  float high, low;  // of the high nibble, the even element, and of the low one
};

/// The levels of both codes of a byte, by one look-up in shared memory.
class LevelPairs {
 public:
  __device__ explicit LevelPairs(int lane)
      : copy_(dynamic_shared_memory<LevelPair>() + lane % level_pair_copies) {}

  /// Fills the table. All threads of the thread block call it, and __syncthreads before a look-up.
  __device__ static void fill(int thread) {
    const Shared<Bytes16> units = dynamic_shared_memory<Bytes16>();  // two copies of an entry each
    constexpr int units_per_entry = level_pair_copies / 2;
#pragma unroll
    for (int unit = thread; unit < level_pair_bytes / 16; unit += few_tokens_threads) {
      const int byte = unit / units_per_entry;
      const auto high = std::bit_cast<std::uint32_t>(device_levels.values[byte / 16]);
      const auto low = std::bit_cast<std::uint32_t>(device_levels.values[byte % 16]);
      units.store(unit, Bytes16{{high, low, high, low}});
    }
  }

  /// For byte `byte` of a little-endian word of codes.
  __device__ LevelPair operator()(std::uint32_t word, int byte) const {
    return copy_.load(byte_of(word, byte) * level_pair_copies);
  }

 private:
  SharedTable<LevelPair> copy_;
};

// ---- what both directions share

// A chunk is 32 elements, the shortest block; rows are whole chunks. A weight's chunks are counted in
// 32 bits.
inline constexpr int chunk_log2 = 5;
static_assert(1 << chunk_log2 == nf4_min_block_size);

/// Adds up the sums of all warps of the thread block, in a fixed order, into those of warp 0.
template <int count, int tiles>
__device__ void add_over_warps(float (&sums)[count][tiles][4], int thread) {
  const int lane = thread % lanes_per_warp, warp = thread / lanes_per_warp;
  const Shared<Bytes16> memory = dynamic_shared_memory<Bytes16>();  // [warp][count][tiles][lane]
#pragma unroll 1
  for (int half = few_tokens_warps / 2; half > 0; half /= 2) {
    __syncthreads();  // the memory has been read
    if (warp >= half && warp < 2 * half) {
#pragma unroll
      for (int i = 0; i < count * tiles; ++i) {
        const float(&mine)[4] = sums[i / tiles][i % tiles];
        memory.store(
            ((warp - half) * count * tiles + i) * lanes_per_warp + lane,
            Bytes16{{std::bit_cast<std::uint32_t>(mine[0]), std::bit_cast<std::uint32_t>(mine[1]),
                     std::bit_cast<std::uint32_t>(mine[2]),
                     std::bit_cast<std::uint32_t>(mine[3])}});
      }
    }
    __syncthreads();
    if (warp < half) {
#pragma unroll
      for (int i = 0; i < count * tiles; ++i) {
        const Bytes16 others = memory.load((warp * count * tiles + i) * lanes_per_warp + lane);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          sums[i / tiles][i % tiles][j] += std::bit_cast<float>(others.words[j]);
        }
      }
    }
  }
}

/// Stores a sum, or this thread block's part of it, if it is one.
template <typename T>
__device__ void store_sum(const NF4FewTokensArguments<T>& a, int part, int token, int column,
                          int columns, float sum) {
  if (token >= a.m || column >= columns) return;
  const std::int64_t i = std::int64_t{token} * columns + column;
  if (a.partials != nullptr) {
    a.partials[std::int64_t{part} * a.m * columns + i] = sum;
  } else {
    a.output[i] = round_to<T>(a.bias != nullptr ? sum + widen(a.bias[column]) : sum);
  }
}

/// output = the partials of all thread blocks, in order, + bias.
///
///   partials fp32 [split, count], bias T [columns] or null, output T [count]; a thread owns an
///   element
template <typename T>
__global__ void __launch_bounds__(few_tokens_threads)
    nf4_few_tokens_sum_kernel(const float* partials, const T* bias, T* output, std::int64_t count,
                              int columns, int split) {
  for (std::int64_t i = std::int64_t{blockIdx.x} * few_tokens_threads + threadIdx.x; i < count;
       i += std::int64_t{gridDim.x} * few_tokens_threads) {
    float sum = partials[i];
#pragma unroll 4
    for (int part = 1; part < split; ++part) sum += partials[part * count + i];
    output[i] = round_to<T>(bias != nullptr ? sum + widen(bias[i % columns]) : sum);
  }
}

// ---- forward

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

  const int unit_count = a.k / forward_columns_per_unit;  // those that are whole
  const int unit_stride = few_tokens_warps * a.split;
  const int first_unit = part * few_tokens_warps + thread / lanes_per_warp;
  typename Warp::Codes on_their_way[stages];
#pragma unroll
  for (int stage = 0; stage < stages; ++stage) {
    const int unit = first_unit + stage * unit_stride;
    if (unit < unit_count) warp.template load<true>(on_their_way[stage], unit);
  }
  LevelPairs::fill(thread);
  __syncthreads();

  float sums[fragments][token_tiles][4] = {};
  int unit = first_unit;
#pragma unroll 1
  while (unit < unit_count) {
#pragma unroll
    for (int stage = 0; stage < stages; ++stage) {
      if (unit < unit_count) {
        warp.template multiply<true>(on_their_way[stage], unit, sums);
        const int next = unit + stages * unit_stride;
        if (next < unit_count) warp.template load<true>(on_their_way[stage], next);
        unit += unit_stride;
      }
    }
  }
  if (unit == unit_count && a.k % forward_columns_per_unit != 0) {
    warp.template load<false>(on_their_way[0], unit);
    warp.template multiply<false>(on_their_way[0], unit, sums);
  }

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

// ---- gradient of the input

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

  const int unit_count = a.n / grad_rows_per_unit;  // those that are whole
  const int unit_stride = few_tokens_warps * a.split;
  const int first_unit = part * few_tokens_warps + thread / lanes_per_warp;
  typename Warp::Codes on_their_way[stages];
#pragma unroll
  for (int stage = 0; stage < stages; ++stage) {
    const int unit = first_unit + stage * unit_stride;
    if (unit < unit_count) warp.template load<true>(on_their_way[stage], unit);
  }
  LevelPairs::fill(thread);
  __syncthreads();

  float sums[bytes][token_tiles][4] = {};
  int unit = first_unit;
#pragma unroll 1
  while (unit < unit_count) {
#pragma unroll
    for (int stage = 0; stage < stages; ++stage) {
      if (unit < unit_count) {
        warp.template multiply<true>(on_their_way[stage], unit, sums);
        const int next = unit + stages * unit_stride;
        if (next < unit_count) warp.template load<true>(on_their_way[stage], next);
        unit += unit_stride;
      }
    }
  }
  if (unit == unit_count && a.n % grad_rows_per_unit != 0) {
    warp.template load<false>(on_their_way[0], unit);
    warp.template multiply<false>(on_their_way[0], unit, sums);
  }

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
