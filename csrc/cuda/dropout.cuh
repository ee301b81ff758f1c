// The dropout kernel. dropout.cu launches it; host tests run its body.
#pragma once

#include <bit>

#include "core/philox.h"
#include "cuda/nf4_codec_map.h"
#include "cuda/ptx.cuh"

namespace qlora::cuda {

template <typename T>
struct DropoutArguments {
  const T* x;
  T* out;  // may be x
  std::int64_t element_count;
  const std::int64_t* seed;
  DropoutMask mask;  // of any seed
  bool is_aligned;   // x and out to 16 bytes
};

/// x / (1 - p), or 0 where `word` says so.
__device__ inline float drop_or_scale(const DropoutMask& mask, std::uint32_t word, float x) {
  return mask.keeps(word) ? x * mask.keep_scale : 0.0f;
}

/// Element `i` of a chunk, in fp32.
template <typename T>
__device__ float element_of(const Bytes16& chunk, int i) {
  if constexpr (sizeof(T) == 4) {
    return std::bit_cast<float>(chunk.words[i]);
  } else {
    return widen(T{static_cast<std::uint16_t>(chunk.words[i / 2] >> 16 * (i % 2))});
  }
}

/// out_e = x_e / (1 - p), or 0 where the mask of core/philox.h drops e, rounded once.
///
///   x, out T [count], any count; seed int64 [1], in device memory
///   a thread owns a chunk of 16 bytes at a time: 4 or 8 elements, which are 1 or 2 Philox counters
///   reads and writes sizeof(T) an element; some 20 instructions, 5 of them 32 x 32 bit products:
///   three quarters of an H200's issue slots at its memory's speed in a 16-bit type
///   precondition: x and out are aligned to sizeof(T)
template <typename T>
__global__ void __launch_bounds__(threads_per_thread_block)
    dropout_kernel(const DropoutArguments<T> a) {
  constexpr int elements = elements_per_chunk<T>;
  DropoutMask mask = a.mask;
  mask.seed = static_cast<std::uint64_t>(*a.seed);
  const std::int64_t chunks = ceil_divide(a.element_count, elements);
  const std::int64_t stride = std::int64_t{gridDim.x} * threads_per_thread_block;
  for (std::int64_t chunk = std::int64_t{blockIdx.x} * threads_per_thread_block + threadIdx.x;
       chunk < chunks; chunk += stride) {
    const std::int64_t begin = chunk * elements;
    const bool is_whole = a.is_aligned && begin + elements <= a.element_count;
    Bytes16 in{};
    if (is_whole) in = load_16_bytes(a.x + begin);
    float kept[elements];
#pragma unroll
    for (int four = 0; four < elements / 4; ++four) {
      const PhiloxWords words = mask.words_of_four(static_cast<std::uint64_t>(begin / 4 + four));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int e = 4 * four + i;
        float x = element_of<T>(in, e);
        if (!is_whole && begin + e < a.element_count) x = to_float(a.x[begin + e]);
        kept[e] = drop_or_scale(mask, words.word[i], x);
      }
    }
    if (is_whole) {
      Bytes16 out;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if constexpr (sizeof(T) == 4) {
          out.words[i] = std::bit_cast<std::uint32_t>(kept[i]);
        } else {
          out.words[i] = round_pair<T>(kept[2 * i], kept[2 * i + 1]);
        }
      }
      store_16_bytes(a.out + begin, out);
    } else {
#pragma unroll
      for (int e = 0; e < elements; ++e) {
        if (begin + e < a.element_count) a.out[begin + e] = from_float<T>(kept[e]);
      }
    }
  }
}

}  // namespace qlora::cuda
