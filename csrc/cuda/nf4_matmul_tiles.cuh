// The tensor-core kernel for tens to hundreds of tokens. nf4_matmul_tiles.cu launches it; host tests
// run its body; nf4_matmul_tiles_map.h says which lane owns what.
//
// Where a weight is decoded. Either once a thread block into a dense tile in shared memory, which
// ldmatrix reads; or, as here, by the lane that needs it, into the registers of operand A. A warp
// then owns columns of its own and multiplies them with all tokens of the thread block. Shared
// memory is the narrowest pipe of the two designs (128 bytes a clock), and a stage of 128 columns,
// 128 tokens and 64 of the sum takes of it, in clocks (all numbers here are computed, not measured):
//
//                        look-ups  A written, read  B read  tokens  codes, scales   sum
//   dense tile, 64 x 64       256        128   256     256     128             72   1096
//   registers, 32 x 128       256          0     0     512     128             88    984
//
// with a barrier less. (The gradient reads codes in 2 bytes and more scales: 1064. With 64 tokens
// the two directions take 664 and 744.) The 512 mma of the stage take 1024 clocks on compute
// capability 8.0 and, at the two thirds of the peak that mma.sync is known to reach on 9.0, 768 there.
// So shared memory allows, of the rate of mma.sync,
//
//                128 tokens: forward, gradient      64 tokens: forward, gradient
//   8.0                100 %    96 %                         77 %    69 %
//   9.0                 78 %    72 %                         58 %    52 %
//
// and all of it on 8.6, 8.9 and 12.0, whose tensor cores are slower. Each of the four schedulers has
// some 700 instructions to issue in those 984 clocks (750 in 1064): 128 mma, 288 to decode (4.5 a
// weight), 32 reads of B; the rest copy, read scales and compute addresses.
#pragma once

#include <algorithm>
#include <bit>

#include "cuda/copy_async.cuh"
#include "cuda/mma.cuh"
#include "cuda/nf4_codec_map.h"
#include "cuda/nf4_level_table.cuh"
#include "cuda/nf4_matmul_tiles_map.h"

namespace qlora::cuda::tiles {

static_assert(NF4LevelTable::bytes == level_table_bytes);

template <typename T>
struct Arguments {
  const T* input;
  const std::uint8_t* codes;
  NF4Scales scales;
  const T* bias;        // null: none
  T* output;            // unless there are splits
  float* partial_sums;  // else [splits, m, padded_columns]
  std::int64_t m, n, k;
  std::int64_t columns, padded_columns, reduced;
  int block_size_log2;
  unsigned token_tiles, column_tiles;
  int stage_count, stages_per_split;
  bool is_output_aligned;  // four neighbours are one access
};

/// The tile and the stages of a thread block. Those that share a tile of the weight run at the same
/// time, so that one of them reads it from device memory and the others from L2.
struct Tile {
  template <typename T>
  __device__ Tile(const Arguments<T>& a, int tokens)
      : first_token(std::int64_t{blockIdx.x % a.token_tiles} * tokens),
        first_column(std::int64_t{blockIdx.x / a.token_tiles % a.column_tiles} * columns_per_tile),
        split(static_cast<int>(blockIdx.x / a.token_tiles / a.column_tiles)),
        first_stage(split * a.stages_per_split),
        end_stage(std::min(a.stage_count, first_stage + a.stages_per_split)) {}

  /// The stages, of those before end_stage, in which what is at index `i` of the first exists.
  __device__ int end_of(std::int64_t i, std::int64_t size) const {
    const std::int64_t stages = ceil_divide(size - i, reduced_per_stage);  // can be 0 or less
    return static_cast<int>(std::min(std::int64_t{end_stage}, stages));
  }

  std::int64_t first_token, first_column;
  int split, first_stage, end_stage;
};

/// The tokens' way into shared memory: T [tokens, 64] a stage, zeros where there is no element.
template <typename T, int tokens>
class TokenCopies {
 public:
  __device__ TokenCopies(const Arguments<T>& a, const Tile& tile, int thread)
      : chunk_(thread % chunks_per_token),
        token_(thread / chunks_per_token),
        token_count_(static_cast<int>(std::min<std::int64_t>(tokens, a.m - tile.first_token))),
        end_stage_(tile.end_of(8 * chunk_, a.reduced)),
        stride_(a.reduced),
        first_((tile.first_token + token_) * a.reduced + 8 * chunk_),
        input_(a.input) {}

  __device__ void copy(int stage, Shared<T> to) const {
    constexpr int tokens_per_copy = thread_count / chunks_per_token;
    std::int64_t element = first_ + std::int64_t{stage} * reduced_per_stage;
    // By two: the addresses of all copies at once would crowd the sums out of their registers.
#pragma unroll 2
    for (int i = 0; i < tokens / tokens_per_copy; ++i) {
      const int token = token_ + i * tokens_per_copy;
      const bool is_inside = stage < end_stage_ && token < token_count_;
      copy_async_16(to + 8 * token_chunk_position(token, chunk_),
                    input_ + (is_inside ? element : 0), is_inside);
      element += tokens_per_copy * stride_;
    }
  }

 private:
  int chunk_, token_, token_count_, end_stage_;
  std::int64_t stride_, first_;
  const T* input_;
};

/// The weight's way into shared memory: codes by asynchronous copies, scales through registers, a
/// stage at a time. A chunk that does not exist gets codes and a scale of zero.
template <Direction direction>
class WeightCopies {
 public:
  template <typename T>
  __device__ WeightCopies(const Arguments<T>& a, const Tile& tile, int thread)
      : codes_(a.codes),
        scales_(a.scales),
        elements_per_stage_(reduced_per_stage * (is_forward ? 1 : a.k)),
        block_size_log2_(a.block_size_log2),
        thread_(thread) {
#pragma unroll
    for (int i = 0; i < weight_chunks_per_thread; ++i) {
      const WeightChunk chunk = weight_chunk_at<direction>(position_of(i));
      const std::int64_t row = (is_forward ? tile.first_column : 0) + chunk.row;
      const std::int64_t column =
          (is_forward ? 0 : tile.first_column) + weights_per_chunk * chunk.group;
      const bool is_column = is_forward ? row < a.n : column < a.k;
      end_stage_[i] = is_column ? tile.end_of(is_forward ? column : row, a.reduced) : 0;
      first_[i] = row * a.k + column;
    }
  }

  /// Begins to copy the codes, and to load the scales.
  __device__ void copy(int stage, Shared<unsigned char> codes) {
#pragma unroll
    for (int i = 0; i < weight_chunks_per_thread; ++i) {
      const bool is_inside = stage < end_stage_[i];
      const std::int64_t element = is_inside ? first_[i] + stage * elements_per_stage_ : 0;
      copy_async_16(codes + bytes_per_weight_chunk * position_of(i), codes_ + element / 2,
                    is_inside);
      if (is_inside) stored_[i] = scales_.load(element >> block_size_log2_);
    }
  }

  /// Stores the scales that `copy` of the stage, the last one, has loaded.
  __device__ void store_scales(int stage, Shared<float> to) const {
#pragma unroll
    for (int i = 0; i < weight_chunks_per_thread; ++i) {
      const float scale = stage < end_stage_[i] ? scales_.decode(stored_[i]) : 0.0f;
      to.store(scale_at<direction>(position_of(i)), scale);
    }
  }

 private:
  static constexpr bool is_forward = direction == Direction::forward;

  __device__ int position_of(int i) const { return thread_ + i * thread_count; }

  const std::uint8_t* codes_;
  AnyScaleReader scales_;
  std::int64_t elements_per_stage_;
  std::int64_t first_[weight_chunks_per_thread];
  int end_stage_[weight_chunks_per_thread];
  int block_size_log2_, thread_;
  AnyScaleReader::Stored stored_[weight_chunks_per_thread] = {};
};

/// The codes and scales of a lane's 4 columns and 8 elements of the sum, half a stage. The halves of a
/// stage are loaded one after the other, the first first.
template <Direction direction>
class EncodedHalf;

template <>
class EncodedHalf<Direction::forward> {
 public:
  __device__ void load(Shared<unsigned char> codes, Shared<float> scales, int warp, int lane,
                       int half) {
#pragma unroll
    for (int slot = 0; slot < slots_per_lane; ++slot) {
      if (half == 1) {  // came with the first
        words_[slot] = second_words_[slot];
        continue;
      }
      const auto both =
          (codes + forward_codes_at(warp, lane, slot)).template as<std::uint64_t>().load();
      words_[slot] = static_cast<std::uint32_t>(both);
      second_words_[slot] = static_cast<std::uint32_t>(both >> 32);
      scales_[slot] = scales.load(forward_scale_at(warp, lane, slot));
    }
  }

  __device__ float decode(int slot, int e, const NF4LevelTable& level) const {
    return level(words_[slot], code_shift(e)) * scales_[slot];
  }

 private:
  std::uint32_t words_[slots_per_lane], second_words_[slots_per_lane];
  float scales_[slots_per_lane];
};

template <>
class EncodedHalf<Direction::grad_input> {
 public:
  __device__ void load(Shared<unsigned char> codes, Shared<float> scales, int warp, int lane,
                       int half) {
#pragma unroll
    for (int four = 0; four < reduced_per_half / 4; ++four) {
      const Bytes16 loaded =
          (scales + grad_scales_at(warp, lane, reduced_per_half / 4 * half + four))
              .template as<Bytes16>()
              .load();
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int e = 4 * four + i;
        scales_[e] = std::bit_cast<float>(loaded.words[i]);
        words_[e] =
            (codes + grad_codes_at(warp, lane, half, e)).template as<std::uint16_t>().load();
      }
    }
  }

  __device__ float decode(int slot, int e, const NF4LevelTable& level) const {
    return level(words_[e], code_shift(slot)) * scales_[e];
  }

 private:
  std::uint32_t words_[reduced_per_half];
  float scales_[reduced_per_half];
};

inline constexpr int mma_steps_per_half = 2;
inline constexpr int mma_tiles_per_warp = columns_per_warp / 16;
inline constexpr int decoded_registers = mma_steps_per_half * mma_tiles_per_warp * 4;

/// Operand A for half a stage.
struct DecodedHalf {
  std::uint32_t a[mma_steps_per_half][mma_tiles_per_warp][4];

  /// Decodes the two weights of register `i` of 16.
  template <typename T, Direction direction>
  __device__ void decode(int i, const EncodedHalf<direction>& half, const NF4LevelTable& level) {
    const int r = i % 4, tile = i / 4 % mma_tiles_per_warp, step = i / 4 / mma_tiles_per_warp;
    const int e = first_element(step, r), slot = slot_of(tile, r);
    a[step][tile][r] = round_pair<T>(half.decode(slot, e, level), half.decode(slot, e + 1, level));
  }
};

template <int tokens>
using Sums = float[mma_tiles_per_warp][tokens / tokens_per_mma][4];

/// sums += `now` times half `half` of a stage's tokens; meanwhile `encoded` is decoded into `next`,
/// a few weights between two tiles of tokens.
template <typename T, int tokens, Direction direction>
__device__ void multiply_and_decode(Sums<tokens>& sums, const DecodedHalf& now, DecodedHalf& next,
                                    const EncodedHalf<direction>& encoded,
                                    const NF4LevelTable& level, Shared<T> stage, int lane,
                                    int half) {
  // Two tiles of tokens at a time: four mma lie between two that add to the same sums.
  constexpr int rounds = tokens / tokens_per_mma / 2;
  constexpr int registers_per_round = decoded_registers / rounds;
  const Shared<T> mine = stage + 8 * token_chunk_position(lane / 4, token_chunk_of(lane, half));
#pragma unroll
  for (int round = 0; round < rounds; ++round) {
    Bytes16 b[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      b[i] = (mine + 8 * token_chunk_position(tokens_per_mma * (2 * round + i), 0))
                 .template as<Bytes16>()
                 .load();
    }
#pragma unroll
    for (int step = 0; step < mma_steps_per_half; ++step) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const std::uint32_t operand[2] = {b[i].words[2 * step], b[i].words[2 * step + 1]};
#pragma unroll
        for (int tile = 0; tile < mma_tiles_per_warp; ++tile) {
          multiply_accumulate<T>(sums[tile][2 * round + i], now.a[step][tile], operand);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < registers_per_round; ++i) {
      next.decode<T>(registers_per_round * round + i, encoded, level);
    }
  }
}

/// Rounds four neighbours of a row of the output and stores those that exist.
template <typename T>
__device__ void store_four(const Arguments<T>& a, std::int64_t token, std::int64_t column,
                           const float (&values)[4]) {
  T* const to = a.output + token * a.columns + column;
  const std::uint32_t pairs[2] = {round_pair<T>(values[0], values[1]),
                                  round_pair<T>(values[2], values[3])};
  if (a.is_output_aligned && column + 4 <= a.columns) {
    *reinterpret_cast<std::uint64_t*>(to) = pairs[0] | std::uint64_t{pairs[1]} << 32;
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (column + i < a.columns) to[i] = T{static_cast<std::uint16_t>(pairs[i / 2] >> 16 * (i % 2))};
  }
}

/// The bias of four neighbouring columns; zeros beyond the last.
template <typename T>
struct FourBiases {
  float values[4];

  __device__ FourBiases(const Arguments<T>& a, std::int64_t column) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      values[i] = a.bias && column + i < a.columns ? widen(a.bias[column + i]) : 0.0f;
    }
  }
};

/// Stores a warp's sums: partial ones in fp32, or with the bias, rounded once.
template <typename T, int tokens>
__device__ void store_sums(const Arguments<T>& a, const Tile& tile, const Sums<tokens>& sums,
                           int warp, int lane) {
  const std::int64_t column = tile.first_column + columns_per_warp * warp + column_of(lane, 0);
  const FourBiases<T> bias(a, column);
#pragma unroll
  for (int j = 0; j < tokens / tokens_per_mma; ++j) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const std::int64_t token = tile.first_token + tokens_per_mma * j + 2 * (lane % 4) + i;
      if (token >= a.m) continue;
      const float four[4] = {sums[0][j][i], sums[0][j][2 + i], sums[1][j][i], sums[1][j][2 + i]};
      if (a.partial_sums) {
        float* const to = a.partial_sums + (tile.split * a.m + token) * a.padded_columns + column;
        Bytes16 bits;
#pragma unroll
        for (int c = 0; c < 4; ++c) bits.words[c] = std::bit_cast<std::uint32_t>(four[c]);
        store_16_bytes_to_global(to, bits);
      } else {
        const float values[4] = {four[0] + bias.values[0], four[1] + bias.values[1],
                                 four[2] + bias.values[2], four[3] + bias.values[3]};
        store_four(a, token, column, values);
      }
    }
  }
}

template <int tokens>
inline constexpr int min_thread_blocks = tokens == 128 ? 2 : 3;  // on a multiprocessor

/// forward: y[m,n] = x[m,k] · Wᵀ + bias; gradient: dx[m,k] = dy[m,n] · W; fp32 sums, rounded once.
///
///   input, bias, output T (16 bits); W as in format/nf4_layout.h; m, and n forward, are any
///   a thread block owns 128 columns and `tokens` tokens, and a range of the stages (Tile)
///   reads its tile of W and of the input once; 4.5 instructions a weight, 1 mma for 2048 products
///   shared memory: shared_bytes(tokens), 70 KB for 128 tokens, 46 for 64
///   preconditions: k a multiple of 32, n in the gradient one of 8; input and codes aligned to 16
template <typename T, Direction direction, int tokens>
__global__ void __launch_bounds__(thread_count, min_thread_blocks<tokens>)
    nf4_matmul_tiles_kernel(const Arguments<T> a) {
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % lanes_per_warp, warp = thread / lanes_per_warp;
  const Tile tile(a, tokens);
  const auto level_memory = dynamic_shared_memory<unsigned char>();
  const NF4LevelTable level(level_memory, lane);
  const auto codes_of = [](int slot) {
    return dynamic_shared_memory<unsigned char>(codes_begin) + slot * codes_bytes_per_stage;
  };
  const auto scales_of = [](int slot) {
    return dynamic_shared_memory<float>(scales_begin) + slot * weight_chunks_per_stage;
  };
  const auto tokens_of = [](int slot) {
    return dynamic_shared_memory<T>(tokens_begin) + slot * (reduced_per_stage * tokens);
  };
  const TokenCopies<T, tokens> token_copies(a, tile, thread);
  WeightCopies<direction> weight_copies(a, tile, thread);

  // Group i of the copies is stage i of the tokens and stage i + 1 of the weight.
  NF4LevelTable::fill(level_memory, thread, thread_count);
  for (int i = 0; i < 3; ++i) {
    weight_copies.copy(tile.first_stage + i, codes_of(i));
    if (i < 2) weight_copies.store_scales(tile.first_stage + i, scales_of(i));
    if (i == 0) continue;
    token_copies.copy(tile.first_stage + i - 1, tokens_of(i - 1));
    commit_copies();
  }
  wait_for_copies<1>();
  __syncthreads();

  Sums<tokens> sums{};
  EncodedHalf<direction> encoded;
  DecodedHalf even, odd;
  encoded.load(codes_of(0), scales_of(0), warp, lane, 0);
#pragma unroll
  for (int i = 0; i < decoded_registers; ++i) even.decode<T>(i, encoded, level);

  int token_slot = 0, weight_slot = 0;
  const auto after = [](int slot, int distance, int count) {
    return slot + distance < count ? slot + distance : slot + distance - count;
  };
#pragma unroll 1
  for (int stage = tile.first_stage; stage < tile.end_stage; ++stage) {
    weight_copies.store_scales(stage + 2, scales_of(after(weight_slot, 2, weight_stages)));
    weight_copies.copy(stage + 3, codes_of(after(weight_slot, 3, weight_stages)));
    token_copies.copy(stage + 2, tokens_of(after(token_slot, 2, token_stages)));
    commit_copies();
    __syncwarp();  // mma wants all lanes, also those with no scale to load

    const Shared<T> tokens_now = tokens_of(token_slot);
    encoded.load(codes_of(weight_slot), scales_of(weight_slot), warp, lane, 1);
    multiply_and_decode<T, tokens>(sums, even, odd, encoded, level, tokens_now, lane, 0);

    weight_slot = after(weight_slot, 1, weight_stages);
    token_slot = after(token_slot, 1, token_stages);
    encoded.load(codes_of(weight_slot), scales_of(weight_slot), warp, lane, 0);
    multiply_and_decode<T, tokens>(sums, odd, even, encoded, level, tokens_now, lane, 1);

    wait_for_copies<1>();
    __syncthreads();
  }
  wait_for_copies<0>();
  store_sums<T, tokens>(a, tile, sums, warp, lane);
}

inline constexpr int sum_thread_count = 256;
inline constexpr int columns_per_sum_block = 4 * sum_thread_count;

/// output = the sum of partial_sums over the splits, in their order, + bias, rounded once.
///
///   partial_sums fp32 [splits, m, padded_columns]; output T [m, columns]
///   a thread owns four neighbouring columns of a token, a thread block 1024 of them
template <typename T>
__global__ void __launch_bounds__(sum_thread_count)
    nf4_matmul_tiles_sum_kernel(const Arguments<T> a, int splits, unsigned blocks_per_token) {
  const std::int64_t token = blockIdx.x / blocks_per_token;
  const std::int64_t column =
      std::int64_t{blockIdx.x % blocks_per_token} * columns_per_sum_block + 4 * threadIdx.x;
  if (column >= a.columns) return;
  const float* const from = a.partial_sums + token * a.padded_columns + column;
  float sums[4] = {};
#pragma unroll 4
  for (int split = 0; split < splits; ++split) {
    const Bytes16 loaded = load_16_bytes(from + split * a.m * a.padded_columns);
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[i] += std::bit_cast<float>(loaded.words[i]);
  }
  const FourBiases<T> bias(a, column);
#pragma unroll
  for (int i = 0; i < 4; ++i) sums[i] += bias.values[i];
  store_four(a, token, column, sums);
}

}  // namespace qlora::cuda::tiles
