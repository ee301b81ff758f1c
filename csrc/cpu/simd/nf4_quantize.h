// nf4_quantize over the vectors of an instruction set. Its `Codec` has
//
//   Simd                    of the set's simd.h
//   Magnitudes              the largest magnitudes so far, lane by lane: grow(x), and largest() as
//                           the bits of an fp32
//   Encoder                 encode(x, codes): the 32 elements of an array of vectors, in units of
//                           absmax, to 16 bytes
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <limits>

#include "cpu/simd/inline.h"
#include "cpu/simd/prefetch.h"
#include "format/nf4_layout.h"

namespace qlora::simd {

/// What a step encodes: the smallest block.
inline constexpr std::int64_t nf4_step = nf4_min_block_size;
inline constexpr std::int64_t nf4_step_bytes = nf4_step / 2;

template <typename Codec, typename T>
class BlockQuantizer {
  using Simd = typename Codec::Simd;
  using Floats = typename Simd::Floats;
  static constexpr std::int64_t vectors = nf4_step / Simd::lanes;

 public:
  /// Writes the codes of a block of `count` elements, and returns its absmax. Where that is NaN or
  /// Inf there are no codes.
  QLORA_INLINE float operator()(const T* w, std::int64_t count, std::uint8_t* codes) const {
    const float absmax = absolute_maximum(w, count);
    const float reciprocal = 1.0f / absmax;
    if (absmax <= largest && reciprocal <= largest) [[likely]] {
      const Floats factor = Simd::broadcast(reciprocal);
      encode(w, count, codes, [factor](Floats x) QLORA_INLINE_LAMBDA { return x * factor; });
    } else if (absmax == 0.0f) {
      std::memset(codes, nf4_pack(nf4_zero_code, nf4_zero_code),
                  static_cast<std::size_t>(nf4_code_bytes(count)));
    } else if (absmax <= largest) {  // as BlockNormalizer
      const Floats divisor = Simd::broadcast(absmax);
      encode(w, count, codes, [divisor](Floats x) QLORA_INLINE_LAMBDA { return x / divisor; });
    }
    return absmax;
  }

 private:
  static constexpr float largest = std::numeric_limits<float>::max();

  /// Calls `step(x, first)` for every 32 elements, with zeros beyond the last.
  template <typename Step>
  QLORA_INLINE static void for_each_step(const T* w, std::int64_t count, Step&& step) {
    Floats x[vectors];
    std::int64_t first = 0;
    for (; first + nf4_step <= count; first += nf4_step) {
      for (std::int64_t v = 0; v < vectors; ++v) x[v] = Simd::load(w + first + v * Simd::lanes);
      step(x, first);
    }
    if (first == count) return;
    for (std::int64_t v = 0; v < vectors; ++v) {
      const std::int64_t begin = first + v * Simd::lanes;
      const std::int64_t left = begin < count ? count - begin : 0;
      x[v] = left == 0 ? Simd::zero()
                       : Simd::load_partial(w + begin, left < Simd::lanes ? left : Simd::lanes);
    }
    step(x, first);
  }

  QLORA_INLINE static float absolute_maximum(const T* w, std::int64_t count) {
    typename Codec::Magnitudes magnitudes[vectors];
    for_each_step(w, count, [&](const Floats(&x)[vectors], std::int64_t) QLORA_INLINE_LAMBDA {
      for (std::int64_t v = 0; v < vectors; ++v) magnitudes[v].grow(x[v]);
    });
    for (std::int64_t v = 1; v < vectors; ++v) magnitudes[0].grow(magnitudes[v]);
    return std::bit_cast<float>(magnitudes[0].largest());
  }

  template <typename Normalize>
  QLORA_INLINE void encode(const T* w, std::int64_t count, std::uint8_t* codes,
                           Normalize&& normalize) const {
    for_each_step(w, count, [&](Floats(&x)[vectors], std::int64_t first) QLORA_INLINE_LAMBDA {
      for (std::int64_t v = 0; v < vectors; ++v) x[v] = normalize(x[v]);
      if (first + nf4_step <= count) {
        encoder_.encode(x, codes + first / 2);
        return;
      }
      std::uint8_t last[nf4_step_bytes];
      encoder_.encode(x, last);
      std::memcpy(codes + first / 2, last, static_cast<std::size_t>(nf4_code_bytes(count - first)));
    });
  }

  typename Codec::Encoder encoder_;
};

/// The kernel of cpu_kernels.h for one dtype.
///
/// It walks 4 groups side by side: one stream of reads leaves a core's prefetcher so little in
/// flight that reading and computing take turns. On a Sapphire Rapids 4096 x 4096 fp32 weights,
/// from memory, on two threads take 5.1 ms with one stream, 3.7 with two, 3.2 with four and with
/// eight, and 2.8 with four and prefetching; reading them alone takes 2.5.
template <typename Codec, typename T>
QLORA_INLINE std::int64_t nf4_quantize_groups(const T* w, const NF4Bytes& out, float* absmax,
                                              double* group_sums, std::int64_t begin,
                                              std::int64_t end) {
  constexpr std::int64_t streams = 4;
  const BlockQuantizer<Codec, T> quantize;
  const std::int64_t block_size = out.block_size;
  const std::int64_t element_count = out.element_count();
  const std::int64_t block_count = out.block_count();
  std::int64_t first_bad_block = block_count;
  for (std::int64_t first = begin; first < end; first += streams) {
    const std::int64_t last = first + streams < end ? first + streams : end;
    double sums[streams] = {};
    for (std::int64_t i = 0; i < nf4_blocks_per_nested_block; ++i) {
      for (std::int64_t group = first; group < last; ++group) {
        const std::int64_t block = group * nf4_blocks_per_nested_block + i;
        if (block >= block_count) break;
        const std::int64_t e = block * block_size;
        const std::int64_t left = element_count - e;
        const std::int64_t count = left < block_size ? left : block_size;
        prefetch_ahead_of(w + e, count * static_cast<std::int64_t>(sizeof(T)));
        const float scale = quantize(w + e, count, out.codes + e / 2);
        absmax[block] = scale;
        sums[group - first] += static_cast<double>(scale);
        const bool is_bad = !(scale <= std::numeric_limits<float>::max());
        if (is_bad && block < first_bad_block) first_bad_block = block;
      }
    }
    if (first_bad_block < block_count) return first_bad_block;
    for (std::int64_t group = first; group < last; ++group) {
      group_sums[group] = sums[group - first];
    }
  }
  return -1;
}

}  // namespace qlora::simd
