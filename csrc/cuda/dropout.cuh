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

/// A chunk of elements from `begin` on, each 4 by one Philox counter.
template <typename T>
__device__ void drop_chunk(const DropoutArguments<T>& a, const DropoutMask& mask,
                           std::int64_t begin) {
  Bytes16 chunk = load_16_bytes(a.x + begin);
#pragma unroll
  for (int e = 0; e < elements_per_chunk<T>; e += 4) {
    const PhiloxWords words = mask.words_of_four(static_cast<std::uint64_t>((begin + e) / 4));
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float x = std::bit_cast<float>(chunk.words[i]);
        chunk.words[i] = std::bit_cast<std::uint32_t>(drop_or_scale(mask, words.word[i], x));
      }
    } else {
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        std::uint32_t& pair = chunk.words[(e + i) / 2];
        const float low = widen(T{static_cast<std::uint16_t>(pair)});
        const float high = widen(T{static_cast<std::uint16_t>(pair >> 16)});
        pair = round_pair<T>(drop_or_scale(mask, words.word[i], low),
                             drop_or_scale(mask, words.word[i + 1], high));
      }
    }
  }
  store_16_bytes(a.out + begin, chunk);
}

/// The same one by one: for the end, and for tensors that are not aligned.
template <typename T>
__device__ void drop_elements(const DropoutArguments<T>& a, const DropoutMask& mask,
                              std::int64_t begin) {
#pragma unroll 1
  for (std::int64_t four = begin; four < begin + elements_per_chunk<T>; four += 4) {
    const PhiloxWords words = mask.words_of_four(static_cast<std::uint64_t>(four / 4));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const std::int64_t e = four + i;
      if (e >= a.element_count) return;
      a.out[e] = from_float<T>(drop_or_scale(mask, words.word[i], to_float(a.x[e])));
    }
  }
}

/// out_e = x_e / (1 - p), or 0 where the mask of core/philox.h drops e, rounded once.
///
///   x, out T [count], any count; seed int64 [1], in device memory
///   a thread owns a chunk of 16 bytes at a time: 4 or 8 elements, which are 1 or 2 Philox counters
///   reads and writes sizeof(T) an element; 24 instructions, 5 of them 32 x 32 bit products: in a
///   16-bit type nine tenths of an H200's issue slots at the speed of its memory
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
    if (a.is_aligned && begin + elements <= a.element_count) {
      drop_chunk(a, mask, begin);
    } else {
      drop_elements(a, mask, begin);
    }
  }
}

}  // namespace qlora::cuda
