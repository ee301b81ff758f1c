// The quantising kernels: absmax and codes of every block. nf4_codec.cu launches them; host tests
// run their bodies.
#pragma once

#include <bit>
#include <limits>
#include <type_traits>

#include "cuda/nf4_codec_map.h"
#include "cuda/ptx.cuh"
#include "format/block_normalizer.h"
#include "format/nf4_encode_table.h"

namespace qlora::cuda {

template <typename T>
struct NF4QuantizeArguments {
  const T* w;
  std::uint8_t* codes;
  float* absmax;  // one a block
  unsigned long long* first_bad_block;
  std::int64_t element_count;
  int chunks_per_block_log2;
  bool is_aligned;  // w to 16 bytes, codes to those of a chunk
};

static __device__ const NF4EncodeTable device_encode_table = nf4_encode_table;

/// nf4_encode for a whole warp: a lane holds one bin of the table and looks the others up by
/// shuffles, so all lanes must call it together.
class WarpEncoder {
 public:
  __device__ explicit WarpEncoder(int lane)
      : threshold_(device_encode_table.threshold[lane]), base_(device_encode_table.base[lane]) {}

  /// Adds nf4_encode(x) << shift to `word`.
  __device__ void add_code(float x, int shift, std::uint32_t& word) const {
    const int bin = static_cast<int>(nf4_bin(x));  // a shuffle takes the low 5 bits
    const float threshold = __shfl_sync(all_lanes, threshold_, bin);
    word += __shfl_sync(all_lanes, base_, bin) << shift;
    if (x > threshold) word += 1u << shift;
  }

 private:
  float threshold_;
  std::uint32_t base_;
};

/// The 16 bytes of a chunk of w; elements beyond the end are 0, whose code is what the format
/// pads an odd count with.
template <typename T, bool is_full>
__device__ Bytes16 load_chunk(const NF4QuantizeArguments<T>& a, std::int64_t chunk) {
  if constexpr (is_full) return load_16_bytes(reinterpret_cast<const Bytes16*>(a.w) + chunk);
  Bytes16 values{};
#pragma unroll
  for (int i = 0; i < elements_per_chunk<T>; ++i) {
    const std::int64_t e = chunk * elements_per_chunk<T> + i;
    if (e < a.element_count) {
      if constexpr (sizeof(T) == 4) {
        values.words[i] = std::bit_cast<std::uint32_t>(a.w[e]);
      } else {
        values.words[i / 2] |= std::uint32_t{a.w[e].bits} << 16 * (i % 2);
      }
    }
  }
  return values;
}

template <typename T>
__device__ void widen_chunk(const Bytes16& chunk, float (&x)[elements_per_chunk<T>]) {
#pragma unroll
  for (int i = 0; i < elements_per_chunk<T>; ++i) {
    if constexpr (sizeof(T) == 4) {
      x[i] = std::bit_cast<float>(chunk.words[i]);
    } else {
      x[i] = widen(T{static_cast<std::uint16_t>(chunk.words[i / 2] >> 16 * (i % 2))});
    }
  }
}

/// The largest magnitude of a chunk, or NaN if it has one.
template <int count>
__device__ float absolute_maximum(const float (&x)[count]) {
  float maximum = 0.0f;
#pragma unroll
  for (int i = 0; i < count; ++i) maximum = max_or_nan(maximum, fabsf(x[i]));
  return maximum;
}

/// The largest value of each run of `lanes` lanes, in all of them.
template <int lanes>
__device__ float maximum_over_lanes(float maximum) {
#pragma unroll
  for (int distance = 1; distance < lanes; distance *= 2) {
    maximum = max_or_nan(maximum, __shfl_xor_sync(all_lanes, maximum, distance));
  }
  return maximum;
}

/// Brings a chunk into units of its block's absmax. Zeros stay zeros, which encode as
/// nf4_zero_code.
template <int count>
__device__ void normalize_chunk(float (&x)[count], float absmax) {
  const BlockNormalizer normalize(absmax);
  if (normalize.is_reciprocal_finite()) {
#pragma unroll
    for (int i = 0; i < count; ++i) x[i] = normalize(x[i]);
  } else if (absmax > 0.0f) {  // rare, and kept apart: a division is many instructions
#pragma unroll
    for (int i = 0; i < count; ++i) x[i] = normalize(x[i]);
  }
}

/// The codes of a chunk as one little-endian word. All lanes must call it together.
template <int count>
__device__ std::uint32_t encode_chunk(const float (&x)[count], const WarpEncoder& encode) {
  std::uint32_t word = 0;
#pragma unroll
  for (int i = 0; i < count; ++i) encode.add_code(x[i], code_shift(i), word);
  return word;
}

template <typename T, bool is_full>
__device__ void store_codes(const NF4QuantizeArguments<T>& a, std::int64_t chunk,
                            std::uint32_t word) {
  if constexpr (is_full) {
    using CodeWord = std::conditional_t<sizeof(T) == 2, std::uint32_t, std::uint16_t>;
    reinterpret_cast<CodeWord*>(a.codes)[chunk] = static_cast<CodeWord>(word);
  } else {
#pragma unroll
    for (int i = 0; i < elements_per_chunk<T>; i += 2) {
      const std::int64_t e = chunk * elements_per_chunk<T> + i;
      if (e >= a.element_count) return;
      a.codes[e >> 1] = static_cast<std::uint8_t>(word >> 4 * i);
    }
  }
}

/// One lane a block calls it.
template <typename T>
__device__ void store_absmax(const NF4QuantizeArguments<T>& a, std::int64_t block, float absmax) {
  a.absmax[block] = absmax;
  if (!(absmax <= std::numeric_limits<float>::max())) {
    atomicMin(a.first_bad_block, static_cast<unsigned long long>(block));
  }
}

/// One step of a tile whose blocks are `lanes` chunks long.
template <typename T, int lanes, bool is_full>
__device__ void quantize_step(const NF4QuantizeArguments<T>& a, std::int64_t chunk, int lane,
                              const Bytes16& values, const WarpEncoder& encode) {
  float x[elements_per_chunk<T>];
  widen_chunk<T>(values, x);
  const float absmax = maximum_over_lanes<lanes>(absolute_maximum(x));
  normalize_chunk(x, absmax);
  store_codes<T, is_full>(a, chunk, encode_chunk(x, encode));
  const bool exists = is_full || chunk * elements_per_chunk<T> < a.element_count;
  if (lane % lanes == 0 && exists) store_absmax(a, chunk >> a.chunks_per_block_log2, absmax);
}

/// absmax[b] = max |w_e| over block b; code_e = nf4_encode(w_e / absmax[b]); blocks of up to a step
/// (256 elements, fp32: 128).
///
///   w T [count], codes uint8 [ceil(count / 2)], absmax fp32 [blocks]; any count
///   a warp owns a tile (nf4_codec_map.h) of 2 steps; `lanes` neighbours share a block
///   first_bad_block: the least block with a NaN or Inf in it, if it was larger before
///   reads sizeof(T) an element, writes 0.5 B and 4 B a block; some 16 instructions, 2 shuffles
///   precondition: block_size = lanes * elements_per_chunk<T>; w is aligned to sizeof(T)
template <typename T, int lanes>
__global__ void __launch_bounds__(threads_per_thread_block)
    nf4_quantize_short_blocks_kernel(const NF4QuantizeArguments<T> a) {
  const int lane = static_cast<int>(threadIdx.x % lanes_per_warp);
  const int warp = warp_index(static_cast<int>(threadIdx.x));
  constexpr int steps = quantize_steps_per_tile;
  const WarpEncoder encode(lane);

  const std::int64_t tiles = tile_count<T>(a.element_count, steps);
  for (std::int64_t tile = std::int64_t{blockIdx.x} * warps_per_thread_block + warp; tile < tiles;
       tile += std::int64_t{gridDim.x} * warps_per_thread_block) {
    if (a.is_aligned && (tile + 1) * steps * elements_per_step<T> <= a.element_count) {
      Bytes16 values[steps];
#pragma unroll
      for (int step = 0; step < steps; ++step) {
        values[step] = load_chunk<T, true>(a, chunk_of(tile, steps, step, lane));
      }
#pragma unroll
      for (int step = 0; step < steps; ++step) {
        const std::int64_t chunk = chunk_of(tile, steps, step, lane);
        quantize_step<T, lanes, true>(a, chunk, lane, values[step], encode);
      }
    } else {
#pragma unroll 1
      for (int step = 0; step < steps; ++step) {
        const std::int64_t chunk = chunk_of(tile, steps, step, lane);
        quantize_step<T, lanes, false>(a, chunk, lane, load_chunk<T, false>(a, chunk), encode);
      }
    }
  }
}

/// A block that is a whole warp's tile: once for its absmax, and once more, from the caches, for
/// its codes.
template <typename T, bool is_full>
__device__ void quantize_long_block(const NF4QuantizeArguments<T>& a, std::int64_t block, int lane,
                                    const WarpEncoder& encode) {
  const int steps = (1 << a.chunks_per_block_log2) / lanes_per_step;
  float x[elements_per_chunk<T>];
  float absmax = 0.0f;
#pragma unroll 4
  for (int step = 0; step < steps; ++step) {
    widen_chunk<T>(load_chunk<T, is_full>(a, chunk_of(block, steps, step, lane)), x);
    absmax = max_or_nan(absmax, absolute_maximum(x));
  }
  absmax = maximum_over_lanes<lanes_per_warp>(absmax);
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    const std::int64_t chunk = chunk_of(block, steps, step, lane);
    widen_chunk<T>(load_chunk<T, is_full>(a, chunk), x);
    normalize_chunk(x, absmax);
    store_codes<T, is_full>(a, chunk, encode_chunk(x, encode));
  }
  if (lane == 0) store_absmax(a, block, absmax);
}

/// nf4_quantize_short_blocks_kernel for longer blocks: a warp owns a block, and w is read twice,
/// the second time from L1 or L2.
///
///   precondition: block_size is a multiple of elements_per_step<T>; w is aligned to sizeof(T)
template <typename T>
__global__ void __launch_bounds__(threads_per_thread_block)
    nf4_quantize_long_blocks_kernel(const NF4QuantizeArguments<T> a) {
  const int lane = static_cast<int>(threadIdx.x % lanes_per_warp);
  const int warp = warp_index(static_cast<int>(threadIdx.x));
  const WarpEncoder encode(lane);

  const std::int64_t block_size = elements_per_chunk<T> << a.chunks_per_block_log2;
  const std::int64_t blocks = nf4_block_count(a.element_count, block_size);
  for (std::int64_t block = std::int64_t{blockIdx.x} * warps_per_thread_block + warp;
       block < blocks; block += std::int64_t{gridDim.x} * warps_per_thread_block) {
    if (a.is_aligned && (block + 1) * block_size <= a.element_count) {
      quantize_long_block<T, true>(a, block, lane, encode);
    } else {
      quantize_long_block<T, false>(a, block, lane, encode);
    }
  }
}

}  // namespace qlora::cuda
