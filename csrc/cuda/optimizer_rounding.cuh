// Stochastic rounding of bfloat16 parameters (core/stochastic_rounding.h) in the optimisers'
// kernels: the random bits of a thread's quads, and the store that uses them.
#pragma once

#include <bit>

#include "core/stochastic_rounding.h"
#include "cuda/optimizer_arguments.h"
#include "cuda/quad.cuh"

namespace qlora::cuda {

/// 16 random bits for each element, lower ones first.
struct RandomQuad {
  std::uint32_t words[2];
};

/// The stream of what is left of its elements from `element` of them on, a multiple of 8.
__device__ inline RoundingStream stream_from(const RoundingStream& from, std::int64_t element) {
  RoundingStream stream = from;
  stream.first_counter +=
      static_cast<std::uint64_t>(element / RoundingStream::elements_per_counter);
  return stream;
}

/// Of the quad that begins at element `first` of a stream: half of what a counter gives.
__device__ inline RandomQuad random_quad(const RoundingStream& stream, int first) {
  const PhiloxWords words = stream.words_of_eight(
      static_cast<std::uint64_t>(first / RoundingStream::elements_per_counter));
  const bool is_second = first / elements_per_quad % 2 != 0;
  return {{is_second ? words.word[2] : words.word[0], is_second ? words.word[3] : words.word[1]}};
}

/// Of a lane's quads of its warp's block, where the stream begins. Two lanes need the same counters,
/// so each computes one of the two, and gives the other lane its half. The whole warp calls this.
__device__ inline void random_quads(const RoundingStream& block, int lane,
                                    RandomQuad (&quads)[quads_per_lane]) {
  static_assert(quads_per_lane == 2);
  const bool is_odd = lane % 2 != 0;
  const int first = quad_of_lane(is_odd ? 1 : 0, lane);
  const PhiloxWords words = block.words_of_eight(
      static_cast<std::uint64_t>(first / RoundingStream::elements_per_counter));
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const std::uint32_t given = is_odd ? words.word[i] : words.word[2 + i];
    const std::uint32_t taken = __shfl_xor_sync(all_lanes, given, 1);
    quads[0].words[i] = is_odd ? taken : words.word[i];
    quads[1].words[i] = is_odd ? words.word[2 + i] : taken;
  }
}

/// store_quad of a bfloat16 parameter, rounded at random.
__device__ inline void store_quad_stochastically(void* elements, const QuadPlace& at,
                                                 const Quad& quad, const RandomQuad& random) {
  Bytes8 bytes;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const std::uint32_t word = random.words[i];
    const std::uint32_t low = round_stochastically(quad.values[2 * i], word & 0xffffu).bits;
    const std::uint32_t high = round_stochastically(quad.values[2 * i + 1], word >> 16).bits;
    bytes.words[i] = low | high << 16;
  }
  store_halves(elements, at, bytes);
}

}  // namespace qlora::cuda
