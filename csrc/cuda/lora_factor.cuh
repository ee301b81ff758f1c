// Reading a LoRA factor on the device: any float dtype, rounded once to the type T that the products
// are taken in.
#pragma once

#include <bit>
#include <type_traits>

#include "core/tensor_view.h"
#include "cuda/lora_map.h"
#include "cuda/ptx.cuh"

namespace qlora::cuda {

/// lora_a [r, k] or lora_b [n, r], row-major.
struct LoRAFactor {
  const void* data;
  DType dtype;
  std::int64_t rows, columns;
  bool has_aligned_chunks;  // every 8 columns of every row begin at a multiple of 16 bytes
};

/// Eight neighbours of a row as they lie in memory: 8 words of fp32, or 4 words of a 16-bit type.
/// Kept so until they are stored, a load need not be waited for where it is issued.
struct LoRAFactorChunk {
  std::uint32_t words[8];
};

/// The chunk from `column` on; zeros for what is outside of the factor.
__device__ inline LoRAFactorChunk load_factor_chunk(const LoRAFactor& factor, std::int64_t row,
                                                    std::int64_t column) {
  LoRAFactorChunk chunk{};
  if (row >= factor.rows || column >= factor.columns) return chunk;
  const std::int64_t begin = row * factor.columns + column;
  const std::int64_t count = factor.columns - column;
  const bool is_whole = factor.has_aligned_chunks && count >= lora_elements_per_chunk;
  if (factor.dtype == DType::float32) {
    const float* const from = static_cast<const float*>(factor.data) + begin;
    if (is_whole) {
      const Bytes16 low = load_16_bytes(from), high = load_16_bytes(from + 4);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        chunk.words[i] = low.words[i];
        chunk.words[4 + i] = high.words[i];
      }
    } else {
#pragma unroll
      for (int i = 0; i < lora_elements_per_chunk; ++i) {
        if (i < count) chunk.words[i] = std::bit_cast<std::uint32_t>(from[i]);
      }
    }
  } else {
    const std::uint16_t* const from = static_cast<const std::uint16_t*>(factor.data) + begin;
    if (is_whole) {
      const Bytes16 bytes = load_16_bytes(from);
#pragma unroll
      for (int i = 0; i < 4; ++i) chunk.words[i] = bytes.words[i];
    } else {
#pragma unroll
      for (int i = 0; i < lora_elements_per_chunk; ++i) {
        if (i < count) chunk.words[i / 2] |= std::uint32_t{from[i]} << 16 * (i % 2);
      }
    }
  }
  return chunk;
}

/// The two elements of a word of a 16-bit type.
template <typename T>
__device__ T low_half(std::uint32_t word) {
  return T{static_cast<std::uint16_t>(word)};
}
template <typename T>
__device__ T high_half(std::uint32_t word) {
  return T{static_cast<std::uint16_t>(word >> 16)};
}

/// A chunk rounded to T.
template <typename T>
__device__ Bytes16 round_factor_chunk(const LoRAFactorChunk& chunk, DType dtype) {
  using OtherT = std::conditional_t<std::is_same_v<T, BFloat16>, Float16, BFloat16>;
  constexpr DType other = std::is_same_v<T, BFloat16> ? DType::float16 : DType::bfloat16;
  Bytes16 out;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (dtype == DType::float32) {
      out.words[i] = round_pair<T>(std::bit_cast<float>(chunk.words[2 * i]),
                                   std::bit_cast<float>(chunk.words[2 * i + 1]));
    } else if (dtype == other) {
      out.words[i] = round_pair<T>(widen(low_half<OtherT>(chunk.words[i])),
                                   widen(high_half<OtherT>(chunk.words[i])));
    } else {
      out.words[i] = chunk.words[i];
    }
  }
  return out;
}

/// One element in fp32, rounded to T. For kernels that need not be fast.
template <typename T>
__device__ float load_factor_element(const LoRAFactor& factor, std::int64_t i) {
  switch (factor.dtype) {
    case DType::bfloat16:
      return round_through<T>(to_float(static_cast<const BFloat16*>(factor.data)[i]));
    case DType::float16:
      return round_through<T>(to_float(static_cast<const Float16*>(factor.data)[i]));
    default: return round_through<T>(static_cast<const float*>(factor.data)[i]);
  }
}

}  // namespace qlora::cuda
