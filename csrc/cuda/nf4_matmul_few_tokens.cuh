// The tensor-core kernels for a few tokens. nf4_matmul_few_tokens.cu launches them; host tests run
// their bodies. nf4_matmul_few_tokens_map.h draws who owns what.
//
// To read 4-bit weights as fast as memory gives them leaves some four instructions a weight. These
// kernels take about 3.5: the codes are loaded as fragments, without a detour by shared memory; a
// byte of codes looks up both its levels at once (shift, mask, load); two multiplications by the
// scale and one rounding make a register of a fragment, in the contract's numbers.
#pragma once

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
  int block_size_log2;
  bool is_input_aligned;  // grad_input: four neighbours of dy are one aligned access
};

// ---- decoding

struct alignas(8) LevelPair {
  float high, low;  // of the high nibble, the even element, and of the low one
};

/// The levels of both codes of a byte, by one look-up in shared memory.
class LevelPairs {
 public:
  __device__ explicit LevelPairs(int lane) : copy_(8u * (lane % level_pair_copies)) {}

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
    constexpr int entry_log2 = 7;
    static_assert(1 << entry_log2 == 8 * level_pair_copies);
    const std::uint32_t shifted = byte == 0 ? word << entry_log2 : word >> (8 * byte - entry_log2);
    const std::uint32_t offset = (shifted & 0xffu << entry_log2) | copy_;
    return dynamic_shared_memory<LevelPair>(static_cast<int>(offset)).load();
  }

 private:
  std::uint32_t copy_;
};

/// ScaleReader for either kind of scales: one kernel serves both, at a uniform branch for some 32
/// weights.
class AnyScaleReader {
 public:
  using Stored = ScaleReader<true>::Stored;

  __device__ explicit AnyScaleReader(const NF4Scales& scales)
      : scales_(scales), offset_(is_nested() ? *scales.nested_offset : 0.0f) {}

  __device__ Stored load(std::uint32_t block) const {
    if (!is_nested()) return {0, reinterpret_cast<const float*>(scales_.absmax)[block]};
    return {scales_.absmax[block],
            scales_.nested_absmax[block >> nf4_blocks_per_nested_block_log2]};
  }

  __device__ float decode(Stored stored) const {
    if (!is_nested()) return stored.absmax;
    return multiply_then_add(device_signed_map.values[stored.q], stored.absmax, offset_);
  }

 private:
  __device__ bool is_nested() const { return scales_.nested_offset != nullptr; }

  NF4Scales scales_;
  float offset_;
};

// ---- what both directions share

struct LanePlace {
  int warp, group, pair;

  __device__ explicit LanePlace(int thread)
      : warp(thread / lanes_per_warp), group(thread % lanes_per_warp / 4), pair(thread % 4) {}
};

/// Adds up the sums of all warps of the thread block, in a fixed order, into those of warp 0.
template <int count>
__device__ void add_over_warps(float (&sums)[count], int thread) {
  static_assert(count % 4 == 0);
  const int lane = thread % lanes_per_warp, warp = thread / lanes_per_warp;
  const Shared<Bytes16> memory = dynamic_shared_memory<Bytes16>();  // [warp][count / 4][lane]
#pragma unroll 1
  for (int half = few_tokens_warps / 2; half > 0; half /= 2) {
    __syncthreads();  // the memory has been read
    if (warp >= half && warp < 2 * half) {
#pragma unroll
      for (int i = 0; i < count / 4; ++i) {
        Bytes16 mine;
#pragma unroll
        for (int j = 0; j < 4; ++j) mine.words[j] = std::bit_cast<std::uint32_t>(sums[4 * i + j]);
        memory.store(((warp - half) * (count / 4) + i) * lanes_per_warp + lane, mine);
      }
    }
    __syncthreads();
    if (warp < half) {
#pragma unroll
      for (int i = 0; i < count / 4; ++i) {
        const Bytes16 others = memory.load((warp * (count / 4) + i) * lanes_per_warp + lane);
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[4 * i + j] += std::bit_cast<float>(others.words[j]);
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

/// A lane's codes of a unit, on their way, with their scales: 32 columns of each of its rows.
template <int row_count>
struct ForwardCodes {
  Bytes16 codes[row_count];
  AnyScaleReader::Stored scales[row_count];
};

/// y[m, n] = x[m, k] · Wᵀ, + bias: in fp32, rounded once to T.
///
///   T bf16 or fp16, m up to 8 * token_tiles, n any, k a multiple of 32, any block size
///   a thread block owns 16 (one tile of tokens) or 32 rows of W and every split-th unit of 8 x 128
///   columns, a warp every eighth of those
///   reads 0.516 B a weight past the caches, and x, 2 m k bytes a thread block, from L2 and L1
///   32 KB of shared memory (the levels, then the sums of warps) and of loads on their way; two
///   thread blocks a multiprocessor
///   preconditions: x, codes and their rows are aligned to 16 bytes, fp32 scales to 4
template <typename T, int token_tiles>
__global__ void __launch_bounds__(few_tokens_threads, 2)
    nf4_few_tokens_forward_kernel(const NF4FewTokensArguments<T> a) {
  constexpr int fragments = forward_fragments(token_tiles);
  constexpr int row_count = 2 * fragments;  // of a lane: group, group + 8, …
  constexpr int stages = 8 / row_count;
  const int thread = static_cast<int>(threadIdx.x);
  const LanePlace place(thread);
  const LevelPairs level_pairs(thread % lanes_per_warp);
  const AnyScaleReader scale_reader(a.scales);

  const int part = static_cast<int>(blockIdx.x) % a.split;
  const int first_row = static_cast<int>(blockIdx.x) / a.split * forward_rows(token_tiles);
  const int unit_count = static_cast<int>(ceil_divide(a.k, forward_columns_per_unit));
  const int unit_stride = few_tokens_warps * a.split;
  const int lane_column = forward_column(thread % lanes_per_warp);

  const auto load_codes = [&](ForwardCodes<row_count>& to, int unit) {
    const int column = unit * forward_columns_per_unit + lane_column;
#pragma unroll
    for (int r = 0; r < row_count; ++r) {
      const int row = first_row + 8 * r + place.group;
      to.codes[r] = {};
      to.scales[r] = {};
      if (row < a.n && column < a.k) {
        const std::int64_t e = std::int64_t{row} * a.k + column;
        to.codes[r] = load_16_bytes_once(a.codes + e / 2);
        to.scales[r] = scale_reader.load(static_cast<std::uint32_t>(e >> a.block_size_log2));
      }
    }
  };
  const auto load_input = [&](Bytes16(&to)[token_tiles], int column) {
#pragma unroll
    for (int tile = 0; tile < token_tiles; ++tile) {
      const int token = tokens_per_mma * tile + place.group;
      to[tile] = {};
      if (token < a.m && column < a.k) {
        to[tile] = load_16_bytes(a.input + std::int64_t{token} * a.k + column);
      }
    }
  };

  ForwardCodes<row_count> on_their_way[stages];
  const int first_unit = part * few_tokens_warps + place.warp;
#pragma unroll
  for (int stage = 0; stage < stages; ++stage) {
    load_codes(on_their_way[stage], first_unit + stage * unit_stride);
  }
  LevelPairs::fill(thread);
  __syncthreads();

  float sums[4 * token_tiles * fragments] = {};
  const auto multiply = [&](const ForwardCodes<row_count>& weight, int unit) {
    const int column = unit * forward_columns_per_unit + lane_column;
    float scales[row_count];
#pragma unroll
    for (int r = 0; r < row_count; ++r) {
      // Beyond the end the weight is 0, and so is x.
      scales[r] = column < a.k ? scale_reader.decode(weight.scales[r]) : 0.0f;
    }
    Bytes16 input[token_tiles], next_input[token_tiles];
    load_input(next_input, column);
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // 8 columns, two steps
#pragma unroll
      for (int tile = 0; tile < token_tiles; ++tile) input[tile] = next_input[tile];
      if (i < 3) load_input(next_input, column + 8 * (i + 1));
#pragma unroll
      for (int step = 0; step < 2; ++step) {
#pragma unroll
        for (int f = 0; f < fragments; ++f) {
          std::uint32_t fragment[4];
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const int r = 2 * f + j % 2;
            const LevelPair pair = level_pairs(weight.codes[r].words[i], 2 * step + j / 2);
            fragment[j] = round_pair<T>(pair.high * scales[r], pair.low * scales[r]);
          }
#pragma unroll
          for (int tile = 0; tile < token_tiles; ++tile) {
            auto& sum = *reinterpret_cast<float(*)[4]>(sums + 4 * (f * token_tiles + tile));
            const std::uint32_t x[2] = {input[tile].words[2 * step],
                                        input[tile].words[2 * step + 1]};
            multiply_accumulate<T>(sum, fragment, x);
          }
        }
      }
    }
  };
  for (int base = first_unit; base < unit_count; base += stages * unit_stride) {
#pragma unroll
    for (int stage = 0; stage < stages; ++stage) {
      const int unit = base + stage * unit_stride;
      if (unit < unit_count) multiply(on_their_way[stage], unit);
      load_codes(on_their_way[stage], unit + stages * unit_stride);
    }
  }

  add_over_warps(sums, thread);
  if (place.warp != 0) return;
#pragma unroll
  for (int f = 0; f < fragments; ++f) {
#pragma unroll
    for (int tile = 0; tile < token_tiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        store_sum(a, part, tokens_per_mma * tile + 2 * place.pair + i % 2,
                  first_row + rows_per_mma * f + 8 * (i / 2) + place.group, a.n,
                  sums[4 * (f * token_tiles + tile) + i]);
      }
    }
  }
}

// ---- gradient of the input

/// A lane's codes of a unit, on their way, with their scales: `words` words of each of its rows.
template <int words>
struct GradCodes {
  std::uint32_t codes[grad_rows_per_lane][words];
  AnyScaleReader::Stored scales[grad_rows_per_lane];
};

template <int words>
__device__ void load_words_once(std::uint32_t (&to)[words], const std::uint8_t* address) {
  if constexpr (words == 4) {
    const Bytes16 value = load_16_bytes_once(address);
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = value.words[i];
  } else if constexpr (words == 2) {
    const auto value = load_once(reinterpret_cast<const std::uint64_t*>(address));
    to[0] = static_cast<std::uint32_t>(value);
    to[1] = static_cast<std::uint32_t>(value >> 32);
  } else {
    to[0] = load_once(reinterpret_cast<const std::uint32_t*>(address));
  }
}

/// dx[m, k] = dy[m, n] · W: in fp32, rounded once to T.
///
///   T bf16 or fp16, m up to 8 * token_tiles, n any, k a multiple of 32, any block size
///   a thread block owns 256 / token_tiles columns of W and every split-th unit of 8 x 16 rows, a
///   warp every eighth of those
///   reads 0.516 B a weight past the caches, and dy, 2 m n bytes a thread block, from L2 and L1
///   32 KB of shared memory (the levels, then the sums of warps); two thread blocks a
///   multiprocessor
///   preconditions: codes and their rows are aligned to 16 bytes, fp32 scales to 4
template <typename T, int token_tiles>
__global__ void __launch_bounds__(few_tokens_threads, 2)
    nf4_few_tokens_grad_input_kernel(const NF4FewTokensArguments<T> a) {
  constexpr int bytes = grad_bytes_per_lane(token_tiles);
  constexpr int stages = 2;
  using Codes = GradCodes<bytes / 4>;
  const int thread = static_cast<int>(threadIdx.x);
  const LanePlace place(thread);
  const LevelPairs level_pairs(thread % lanes_per_warp);
  const AnyScaleReader scale_reader(a.scales);

  const int part = static_cast<int>(blockIdx.x) % a.split;
  const int first_column = static_cast<int>(blockIdx.x) / a.split * grad_columns(token_tiles) +
                           place.group * grad_columns_per_lane(token_tiles);
  const int unit_count = static_cast<int>(ceil_divide(a.n, grad_rows_per_unit));
  const int unit_stride = few_tokens_warps * a.split;

  const auto load_codes = [&](Codes& to, int unit) {
#pragma unroll
    for (int r = 0; r < grad_rows_per_lane; ++r) {
      const int row = unit * grad_rows_per_unit + grad_rows_per_lane * place.pair + r;
      to.scales[r] = {};
#pragma unroll
      for (std::uint32_t& word : to.codes[r]) word = 0;
      if (row < a.n && first_column < a.k) {
        const std::int64_t e = std::int64_t{row} * a.k + first_column;
        load_words_once(to.codes[r], a.codes + e / 2);
        to.scales[r] = scale_reader.load(static_cast<std::uint32_t>(e >> a.block_size_log2));
      }
    }
  };
  const auto load_input = [&](std::uint32_t(&to)[token_tiles][2], int row) {
#pragma unroll
    for (int tile = 0; tile < token_tiles; ++tile) {
      const int token = tokens_per_mma * tile + place.group;
      const T* const from = a.input + std::int64_t{token} * a.n + row;
      to[tile][0] = to[tile][1] = 0;
      if (token >= a.m) continue;
      if (a.is_input_aligned) {
        if (row < a.n) {
          const auto four = *reinterpret_cast<const std::uint64_t*>(from);
          to[tile][0] = static_cast<std::uint32_t>(four);
          to[tile][1] = static_cast<std::uint32_t>(four >> 32);
        }
      } else {
#pragma unroll
        for (int i = 0; i < grad_rows_per_lane; ++i) {
          if (row + i < a.n) to[tile][i / 2] |= std::uint32_t{from[i].bits} << 16 * (i % 2);
        }
      }
    }
  };

  Codes on_their_way[stages];
  const int first_unit = part * few_tokens_warps + place.warp;
#pragma unroll
  for (int stage = 0; stage < stages; ++stage) {
    load_codes(on_their_way[stage], first_unit + stage * unit_stride);
  }
  LevelPairs::fill(thread);
  __syncthreads();

  float sums[4 * token_tiles * bytes] = {};
  const auto multiply = [&](const Codes& weight, int unit) {
    const int row = unit * grad_rows_per_unit + grad_rows_per_lane * place.pair;
    std::uint32_t input[token_tiles][2];
    load_input(input, row);
    float scales[grad_rows_per_lane];
#pragma unroll
    for (int r = 0; r < grad_rows_per_lane; ++r) {
      // Beyond the end the weight is 0, and so is dy.
      scales[r] = row + r < a.n ? scale_reader.decode(weight.scales[r]) : 0.0f;
    }
#pragma unroll
    for (int byte = 0; byte < bytes; ++byte) {
      float even[grad_rows_per_lane], odd[grad_rows_per_lane];
#pragma unroll
      for (int r = 0; r < grad_rows_per_lane; ++r) {
        const LevelPair pair = level_pairs(weight.codes[r][byte / 4], byte % 4);
        even[r] = pair.high * scales[r];
        odd[r] = pair.low * scales[r];
      }
      const std::uint32_t fragment[4] = {
          round_pair<T>(even[0], even[1]), round_pair<T>(odd[0], odd[1]),
          round_pair<T>(even[2], even[3]), round_pair<T>(odd[2], odd[3])};
#pragma unroll
      for (int tile = 0; tile < token_tiles; ++tile) {
        auto& sum = *reinterpret_cast<float(*)[4]>(sums + 4 * (byte * token_tiles + tile));
        multiply_accumulate<T>(sum, fragment, input[tile]);
      }
    }
  };
  for (int base = first_unit; base < unit_count; base += stages * unit_stride) {
#pragma unroll
    for (int stage = 0; stage < stages; ++stage) {
      const int unit = base + stage * unit_stride;
      if (unit < unit_count) multiply(on_their_way[stage], unit);
      load_codes(on_their_way[stage], unit + stages * unit_stride);
    }
  }

  add_over_warps(sums, thread);
  if (place.warp != 0) return;
#pragma unroll
  for (int byte = 0; byte < bytes; ++byte) {
#pragma unroll
    for (int tile = 0; tile < token_tiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        store_sum(a, part, tokens_per_mma * tile + 2 * place.pair + i % 2,
                  first_column + 2 * byte + i / 2, a.k, sums[4 * (byte * token_tiles + tile) + i]);
      }
    }
  }
}

}  // namespace qlora::cuda
