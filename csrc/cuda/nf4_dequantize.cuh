// The dequantising kernels. nf4_codec.cu launches them; host tests run their bodies.
#pragma once

#include <bit>
#include <type_traits>

#include "cuda/nf4_codec_map.h"
#include "cuda/nf4_decode.cuh"

namespace qlora::cuda {

template <typename T>
struct NF4DequantizeArguments {
  const std::uint8_t* codes;
  NF4Scales scales;
  T* out;
  std::int64_t element_count;
  int chunks_per_block_log2;
  bool is_aligned;  // out to 16 bytes, codes to those of a chunk
};

/// The bytes of a chunk's codes, as one little-endian word.
template <typename T>
using CodeWord = std::conditional_t<sizeof(T) == 2, std::uint32_t, std::uint16_t>;

/// The codes of a chunk, one by one; those beyond the end are 0.
template <typename T>
__device__ std::uint32_t load_partial_codes(const NF4DequantizeArguments<T>& a,
                                            std::int64_t chunk) {
  constexpr int bytes = sizeof(CodeWord<T>);
  const std::int64_t byte_count = nf4_code_bytes(a.element_count);
  std::uint32_t word = 0;
#pragma unroll
  for (int i = 0; i < bytes; ++i) {
    const std::int64_t byte = chunk * bytes + i;
    if (byte < byte_count) word |= std::uint32_t{a.codes[byte]} << 8 * i;
  }
  return word;
}

/// The values of a chunk's codes, rounded to T, as they lie in memory. All lanes must call it
/// together.
template <typename T>
__device__ Bytes16 decode_chunk(std::uint32_t codes, float scale, const WarpLevels& level) {
  float values[elements_per_chunk<T>];
#pragma unroll
  for (int i = 0; i < elements_per_chunk<T>; ++i) values[i] = level(codes >> code_shift(i)) * scale;
  Bytes16 out;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      out.words[i] = std::bit_cast<std::uint32_t>(values[i]);
    } else {
      out.words[i] = round_pair<T>(values[2 * i], values[2 * i + 1]);
    }
  }
  return out;
}

/// Stores the elements of a chunk that exist, one by one.
template <typename T>
__device__ void store_partial_chunk(const NF4DequantizeArguments<T>& a, std::int64_t chunk,
                                    const Bytes16& values) {
#pragma unroll
  for (int i = 0; i < elements_per_chunk<T>; ++i) {
    const std::int64_t e = chunk * elements_per_chunk<T> + i;
    if (e >= a.element_count) return;
    if constexpr (sizeof(T) == 4) {
      a.out[e] = std::bit_cast<float>(values.words[i]);
    } else {
      a.out[e] = T{static_cast<std::uint16_t>(values.words[i / 2] >> 16 * (i % 2))};
    }
  }
}

/// A tile that lies within the weight: every load is on its way before the first is used.
template <typename T, bool is_nested>
__device__ void dequantize_full_tile(const NF4DequantizeArguments<T>& a, std::int64_t tile,
                                     int lane, const WarpLevels& level,
                                     const ScaleReader<is_nested>& scales) {
  constexpr int steps = dequantize_steps_per_tile;
  const auto* const code_words = reinterpret_cast<const CodeWord<T>*>(a.codes);
  std::uint32_t codes[steps];
  typename ScaleReader<is_nested>::Stored stored[steps];
#pragma unroll
  for (int step = 0; step < steps; ++step) {
    const std::int64_t chunk = chunk_of(tile, steps, step, lane);
    codes[step] = load_once(code_words + chunk);
    stored[step] = scales.load(chunk >> a.chunks_per_block_log2);
  }
#pragma unroll
  for (int step = 0; step < steps; ++step) {
    const Bytes16 values = decode_chunk<T>(codes[step], scales.decode(stored[step]), level);
    store_16_bytes(reinterpret_cast<Bytes16*>(a.out) + chunk_of(tile, steps, step, lane), values);
  }
}

/// The last tile, or any tile of tensors that are not aligned.
template <typename T, bool is_nested>
__device__ void dequantize_partial_tile(const NF4DequantizeArguments<T>& a, std::int64_t tile,
                                        int lane, const WarpLevels& level,
                                        const ScaleReader<is_nested>& scales) {
#pragma unroll 1
  for (int step = 0; step < dequantize_steps_per_tile; ++step) {
    const std::int64_t chunk = chunk_of(tile, dequantize_steps_per_tile, step, lane);
    const bool exists = chunk * elements_per_chunk<T> < a.element_count;
    const float scale =
        exists ? scales.decode(scales.load(chunk >> a.chunks_per_block_log2)) : 0.0f;
    const Bytes16 values = decode_chunk<T>(load_partial_codes(a, chunk), scale, level);
    store_partial_chunk(a, chunk, values);
  }
}

/// out[e] = level[code[e]] * absmax[e / block_size] in fp32, rounded once to T.
///
///   codes uint8 [ceil(count / 2)], scales as in format/nf4_layout.h, out T [count]; any count
///   a warp owns a tile (nf4_codec_map.h): 1024 elements of a 16-bit T, 512 of fp32
///   reads 0.516 B (nested) and writes sizeof(T) an element; some 6 instructions, 1 a shuffle
///   out stays in L2, where the product that follows finds it; the codes do not
///   precondition: fp32 scales are aligned to 4 bytes, out to sizeof(T)
template <typename T, bool is_nested>
__global__ void __launch_bounds__(threads_per_thread_block)
    nf4_dequantize_kernel(const NF4DequantizeArguments<T> a) {
  const int lane = static_cast<int>(threadIdx.x % lanes_per_warp);
  const int warp = warp_index(static_cast<int>(threadIdx.x));
  constexpr std::int64_t elements_per_tile = dequantize_steps_per_tile * elements_per_step<T>;
  const WarpLevels level(lane);
  const ScaleReader<is_nested> scales(a.scales);

  const std::int64_t tiles = tile_count<T>(a.element_count, dequantize_steps_per_tile);
  for (std::int64_t tile = std::int64_t{blockIdx.x} * warps_per_thread_block + warp; tile < tiles;
       tile += std::int64_t{gridDim.x} * warps_per_thread_block) {
    if (a.is_aligned && (tile + 1) * elements_per_tile <= a.element_count) {
      dequantize_full_tile(a, tile, lane, level, scales);
    } else {
      dequantize_partial_tile(a, tile, lane, level, scales);
    }
  }
}

/// out[b] = absmax of block b in fp32, from nested scales: map[q[b]] * nested_absmax[b / 256] +
/// nested_offset.
///
///   q uint8 [count], out fp32 [count]; a thread owns a block
static __global__ void __launch_bounds__(threads_per_thread_block)
    nf4_dequantize_absmax_kernel(const NF4Scales scales, float* out, std::int64_t count) {
  const ScaleReader<true> reader(scales);
  for (std::int64_t b = std::int64_t{blockIdx.x} * threads_per_thread_block + threadIdx.x;
       b < count; b += std::int64_t{gridDim.x} * threads_per_thread_block) {
    out[b] = reader.decode(reader.load(b));
  }
}

}  // namespace qlora::cuda
