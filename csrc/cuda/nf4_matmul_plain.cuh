// The plain kernel for products with an NF4 weight. nf4_matmul_plain.cu launches it; host tests run
// its body.
#pragma once

#include "cuda/nf4_decode.cuh"
#include "cuda/nf4_matmul.h"
#include "cuda/shared_memory.cuh"

namespace qlora::cuda {

inline constexpr int plain_tokens = 16;   // of a thread block's tile
inline constexpr int plain_columns = 32;  // of the output
inline constexpr int plain_terms = 64;    // of the sums, at a time
inline constexpr int plain_threads = 256;
inline constexpr int plain_tokens_per_thread = plain_tokens * plain_columns / plain_threads;
static_assert(plain_columns == lanes_per_warp);

// Rows of shared memory are a column wider than the tile, so that lanes that write down a column of
// it use different banks.
inline constexpr int plain_weight_pitch = plain_columns + 1;
inline constexpr int plain_shared_bytes =
    4 * (plain_terms * plain_weight_pitch + plain_tokens * plain_terms);

template <typename T>
struct NF4PlainArguments {
  const T* input;  // [m, terms]
  const std::uint8_t* codes;
  NF4Scales scales;
  const T* bias;  // [columns], or null
  T* output;      // [m, columns]
  std::int64_t m, columns, terms;
  // Element (term, column) of the weight is term * term_stride + column * column_stride.
  std::int64_t term_stride, column_stride;
  int block_size_log2;
};

/// An element of the weight, in the numbers that the contract multiplies with.
template <typename T, bool is_nested>
__device__ float decode_element(const NF4PlainArguments<T>& a, const ScaleReader<is_nested>& scales,
                                std::int64_t e) {
  const float level = device_levels.values[nf4_code_at(a.codes, e)];
  return widen(round_to<T>(level * scales.decode(scales.load(e >> a.block_size_log2))));
}

/// output[m, columns] = input[m, terms] · weight, + bias: in fp32, rounded once to T.
///
///   any dtype, shape, block size and address; both directions, by the weight's strides
///   a thread block owns tiles of 16 tokens x 32 columns, a thread 2 tokens of a column
///   the weight is decoded once for 16 tokens, an element at a time, into shared memory (8.4 KB,
///   beside 4 KB of the input); a sum is taken in the order of its terms
///   preconditions: fp32 scales are aligned to 4 bytes, the others to sizeof(T)
template <typename T, bool is_nested>
__global__ void __launch_bounds__(plain_threads)
    nf4_matmul_plain_kernel(const NF4PlainArguments<T> a) {
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % lanes_per_warp;
  const int warp = thread / lanes_per_warp;
  const ScaleReader<is_nested> scales(a.scales);
  const Shared<float> weight = dynamic_shared_memory<float>();            // [terms][columns]
  const Shared<float> input = weight + plain_terms * plain_weight_pitch;  // [tokens][terms]

  const std::int64_t column_tiles = ceil_divide(a.columns, plain_columns);
  const std::int64_t tiles = column_tiles * ceil_divide(a.m, plain_tokens);
  for (std::int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const std::int64_t first_column = tile % column_tiles * plain_columns;
    const std::int64_t first_token = tile / column_tiles * plain_tokens;
    float sums[plain_tokens_per_thread] = {};
    for (std::int64_t first_term = 0; first_term < a.terms; first_term += plain_terms) {
      __syncthreads();  // the last tile has been read
#pragma unroll 4
      for (int i = thread; i < plain_terms * plain_columns; i += plain_threads) {
        // Neighbours in memory go to neighbouring lanes.
        const bool by_columns = a.column_stride == 1;
        const int term = by_columns ? i / plain_columns : i % plain_terms;
        const int column = by_columns ? i % plain_columns : i / plain_terms;
        const std::int64_t t = first_term + term, c = first_column + column;
        const bool exists = t < a.terms && c < a.columns;
        weight.store(
            term * plain_weight_pitch + column,
            exists ? decode_element(a, scales, t * a.term_stride + c * a.column_stride) : 0.0f);
      }
#pragma unroll
      for (int i = thread; i < plain_tokens * plain_terms; i += plain_threads) {
        const std::int64_t token = first_token + i / plain_terms;
        const std::int64_t t = first_term + i % plain_terms;
        const bool exists = token < a.m && t < a.terms;
        input.store(i, exists ? widen(a.input[token * a.terms + t]) : 0.0f);
      }
      __syncthreads();
      if (first_token + warp * plain_tokens_per_thread >= a.m) continue;
      const int count =
          a.terms - first_term < plain_terms ? static_cast<int>(a.terms - first_term) : plain_terms;
#pragma unroll 8
      for (int term = 0; term < count; ++term) {
        const float w = weight.load(term * plain_weight_pitch + lane);
#pragma unroll
        for (int i = 0; i < plain_tokens_per_thread; ++i) {
          const float x = input.load((warp * plain_tokens_per_thread + i) * plain_terms + term);
          sums[i] = fused_multiply_add(x, w, sums[i]);
        }
      }
    }
    const std::int64_t column = first_column + lane;
    if (column >= a.columns) continue;
    const float bias = a.bias != nullptr ? widen(a.bias[column]) : 0.0f;
#pragma unroll
    for (int i = 0; i < plain_tokens_per_thread; ++i) {
      const std::int64_t token = first_token + warp * plain_tokens_per_thread + i;
      if (token >= a.m) break;
      const float sum = a.bias != nullptr ? sums[i] + bias : sums[i];
      a.output[token * a.columns + column] = round_to<T>(sum);
    }
  }
}

}  // namespace qlora::cuda
