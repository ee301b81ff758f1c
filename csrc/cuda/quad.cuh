// Four consecutive elements of a tensor whose dtype is known when the kernel runs: one kernel then
// serves every pair of dtypes of parameters and gradients. The dtype is the same for a whole thread
// block, so that its branches are; they cost less than what the kernels wait for memory.
#pragma once

#include <bit>
#include <cstdint>

#include "cuda/adamw_arguments.h"
#include "cuda/ptx.cuh"

namespace qlora::cuda {

/// As stored: fp32 takes four words, a 16-bit dtype two.
struct RawQuad {
  std::uint32_t words[4];
};

struct Quad {
  float values[elements_per_quad];
};

/// Loads the elements at `first`, of which the tensor has `count`; zeros stand for what is beyond.
/// `is_vector`: all four are there, and aligned to be one access.
__device__ inline RawQuad load_quad(FloatKind kind, const void* tensor, std::int64_t first,
                                    std::int64_t count, bool is_vector) {
  RawQuad raw{};
  if (kind == FloatKind::float32) {
    const auto* const source = static_cast<const std::uint32_t*>(tensor) + first;
    if (is_vector) {
      const Bytes16 bytes = load_16_bytes(source);
#pragma unroll
      for (int i = 0; i < 4; ++i) raw.words[i] = bytes.words[i];
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) raw.words[i] = first + i < count ? source[i] : 0;
    }
  } else {
    const auto* const source = static_cast<const std::uint16_t*>(tensor) + first;
    if (is_vector) {
      const Bytes8 bytes = load_8_bytes(source);
      raw.words[0] = bytes.words[0];
      raw.words[1] = bytes.words[1];
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const std::uint32_t bits = first + i < count ? source[i] : 0;
        raw.words[i / 2] |= bits << (16 * (i % 2));
      }
    }
  }
  return raw;
}

__device__ inline Quad widen(FloatKind kind, const RawQuad& raw) {
  Quad quad;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const auto half = static_cast<std::uint16_t>(raw.words[i / 2] >> (16 * (i % 2)));
    switch (kind) {
      case FloatKind::float32: quad.values[i] = std::bit_cast<float>(raw.words[i]); break;
      case FloatKind::bfloat16: quad.values[i] = widen(BFloat16{half}); break;
      case FloatKind::float16: quad.values[i] = widen(Float16{half}); break;
    }
  }
  return quad;
}

/// Rounds once. Writes nothing beyond the tensor's `count` elements.
__device__ inline void store_quad(FloatKind kind, void* tensor, std::int64_t first,
                                  std::int64_t count, bool is_vector, const Quad& quad) {
  if (kind == FloatKind::float32) {
    float* const target = static_cast<float*>(tensor) + first;
    if (is_vector) {
      Bytes16 bytes;
#pragma unroll
      for (int i = 0; i < 4; ++i) bytes.words[i] = std::bit_cast<std::uint32_t>(quad.values[i]);
      store_16_bytes(target, bytes);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (first + i < count) target[i] = quad.values[i];
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
  auto* const target = static_cast<std::uint16_t*>(tensor) + first;
  if (is_vector) {
    store_8_bytes(target, bytes);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (first + i < count) {
        target[i] = static_cast<std::uint16_t>(bytes.words[i / 2] >> (16 * (i % 2)));
      }
    }
  }
}

/// Four 8-bit codes, as one little-endian word.
__device__ inline std::uint32_t load_codes(const std::uint8_t* codes, std::int64_t first,
                                           std::int64_t count, bool is_vector) {
  if (is_vector) return *reinterpret_cast<const std::uint32_t*>(codes + first);
  std::uint32_t word = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (first + i < count) word |= std::uint32_t{codes[first + i]} << (8 * i);
  }
  return word;
}

__device__ inline void store_codes(std::uint8_t* codes, std::int64_t first, std::int64_t count,
                                   bool is_vector, std::uint32_t word) {
  if (is_vector) {
    *reinterpret_cast<std::uint32_t*>(codes + first) = word;
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (first + i < count) codes[first + i] = static_cast<std::uint8_t>(word >> (8 * i));
  }
}

}  // namespace qlora::cuda
