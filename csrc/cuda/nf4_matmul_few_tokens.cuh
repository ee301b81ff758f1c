// What the tensor-core kernels for a few tokens share: decoding, the sums of warps and of thread
// blocks.
//
// To read 4-bit weights as fast as an H200's memory gives them leaves some four instructions a weight.
// These kernels take 3.9 (forward, one tile of tokens, counted in the SASS for 9.0), 3 of them to
// decode: the codes are loaded as fragments, without a detour by shared memory; a byte of codes looks
// up both its levels at once (permute, multiply-add, load); two multiplications by the scale and one
// rounding make a register of a fragment, in the contract's numbers.
#pragma once

#include <bit>

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

/// The units of work of a warp: first, first + stride, … below `whole`, and one that is not whole
/// behind the last, if it is the warp's turn and there is one.
struct Units {
  int first, stride, whole;
  bool has_rest;
};

/// Multiplies all units of a warp into `sums`. The codes of `stages` units are on their way while one
/// is multiplied, the first of them while the thread block fills its table of levels.
template <int stages, typename Warp, typename Sums>
__device__ __forceinline__ void sum_units(const Warp& warp, const Units& units, int thread,
                                          Sums& sums) {
  typename Warp::Codes on_their_way[stages];
#pragma unroll
  for (int stage = 0; stage < stages; ++stage) {
    const int unit = units.first + stage * units.stride;
    if (unit < units.whole) warp.template load<true>(on_their_way[stage], unit);
  }
  LevelPairs::fill(thread);
  __syncthreads();

  int unit = units.first;
#pragma unroll 1
  while (unit < units.whole) {
#pragma unroll
    for (int stage = 0; stage < stages; ++stage) {
      if (unit < units.whole) {
        warp.template multiply<true>(on_their_way[stage], unit, sums);
        const int next = unit + stages * units.stride;
        if (next < units.whole) warp.template load<true>(on_their_way[stage], next);
        unit += units.stride;
      }
    }
  }
  if (unit == units.whole && units.has_rest) {
    warp.template load<false>(on_their_way[0], unit);
    warp.template multiply<false>(on_their_way[0], unit, sums);
  }
}

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

}  // namespace qlora::cuda
