// Four consecutive elements of a tensor whose dtype is known when the kernel runs: one kernel then
// serves every pair of dtypes of parameters and gradients. The dtype is the same for a whole thread
// block, so that its branches are; they cost less than what the kernels wait for memory.
#pragma once

#include <bit>
#include <cstdint>

#include "cuda/optimizer_arguments.h"
#include "cuda/ptx.cuh"

namespace qlora::cuda {

/// As stored: fp32 takes four words, a 16-bit dtype two.
struct RawQuad {
  std::uint32_t words[4];
};

struct Quad {
  float values[elements_per_quad];
};

/// Where a thread's elements are: `first` counts from the first element of its chunk or block, which
/// has `count`. `is_vector`: all four are there, and aligned to be one access.
struct QuadPlace {
  int first, count;
  bool is_vector;

  __device__ bool has(int i) const { return first + i < count; }
};

/// The address of element `i` of a tensor.
__device__ inline const void* element_address(FloatKind kind, const void* tensor, std::int64_t i) {
  const int bytes_log2 = kind == FloatKind::float32 ? 2 : 1;
  return static_cast<const std::uint8_t*>(tensor) + (i << bytes_log2);
}
__device__ inline void* element_address(FloatKind kind, void* tensor, std::int64_t i) {
  return const_cast<void*>(element_address(kind, static_cast<const void*>(tensor), i));
}

/// Loads a quad from the elements of a chunk or block; zeros stand for what is beyond its end.
__device__ inline RawQuad load_quad(FloatKind kind, const void* elements, const QuadPlace& at) {
  RawQuad raw{};
  if (kind == FloatKind::float32) {
    const auto* const source = static_cast<const std::uint32_t*>(elements) + at.first;
    if (at.is_vector) {
      const Bytes16 bytes = load_16_bytes(source);
#pragma unroll
      for (int i = 0; i < 4; ++i) raw.words[i] = bytes.words[i];
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) raw.words[i] = at.has(i) ? source[i] : 0;
    }
  } else {
    const auto* const source = static_cast<const std::uint16_t*>(elements) + at.first;
    if (at.is_vector) {
      const Bytes8 bytes = load_8_bytes(source);
      raw.words[0] = bytes.words[0];
      raw.words[1] = bytes.words[1];
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const std::uint32_t bits = at.has(i) ? source[i] : 0;
        raw.words[i / 2] |= bits << (16 * (i % 2));
      }
    }
  }
  return raw;
}

template <typename T>
__device__ Quad widen_halves(const RawQuad& raw) {
  Quad quad;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    quad.values[i] = widen(T{static_cast<std::uint16_t>(raw.words[i / 2] >> (16 * (i % 2)))});
  }
  return quad;
}

__device__ inline Quad widen(FloatKind kind, const RawQuad& raw) {
  if (kind == FloatKind::bfloat16) return widen_halves<BFloat16>(raw);
  if (kind == FloatKind::float16) return widen_halves<Float16>(raw);
  return std::bit_cast<Quad>(raw);
}

/// Stores a quad of a 16-bit dtype. Writes nothing beyond the end of the chunk or block.
__device__ inline void store_halves(void* elements, const QuadPlace& at, const Bytes8& bytes) {
  auto* const target = static_cast<std::uint16_t*>(elements) + at.first;
  if (at.is_vector) {
    store_8_bytes(target, bytes);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (at.has(i)) {
        target[i] = static_cast<std::uint16_t>(bytes.words[i / 2] >> (16 * (i % 2)));
      }
    }
  }
}

/// Rounds once. Writes nothing beyond the end of the chunk or block.
__device__ inline void store_quad(FloatKind kind, void* elements, const QuadPlace& at,
                                  const Quad& quad) {
  if (kind == FloatKind::float32) {
    float* const target = static_cast<float*>(elements) + at.first;
    if (at.is_vector) {
      Bytes16 bytes;
#pragma unroll
      for (int i = 0; i < 4; ++i) bytes.words[i] = std::bit_cast<std::uint32_t>(quad.values[i]);
      store_16_bytes(target, bytes);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (at.has(i)) target[i] = quad.values[i];
      }
    }
    return;
  }
  Bytes8 bytes;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float low = quad.values[2 * i], high = quad.values[2 * i + 1];
    bytes.words[i] = kind == FloatKind::bfloat16 ? round_pair<BFloat16>(low, high)
                                                 : round_pair<Float16>(low, high);
  }
  store_halves(elements, at, bytes);
}

/// Four 8-bit codes, as one little-endian word.
__device__ inline std::uint32_t load_codes(const std::uint8_t* codes, const QuadPlace& at) {
  if (at.is_vector) return *reinterpret_cast<const std::uint32_t*>(codes + at.first);
  std::uint32_t word = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (at.has(i)) word |= std::uint32_t{codes[at.first + i]} << (8 * i);
  }
  return word;
}

__device__ inline void store_codes(std::uint8_t* codes, const QuadPlace& at, std::uint32_t word) {
  if (at.is_vector) {
    *reinterpret_cast<std::uint32_t*>(codes + at.first) = word;
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (at.has(i)) codes[at.first + i] = static_cast<std::uint8_t>(word >> (8 * i));
  }
}

}  // namespace qlora::cuda
