// nf4_quantize_scales over the vectors of an instruction set. Beside what nf4_quantize.h wants, its
// `Codec` has encode_scales(x, out): a vector's codes of the signed dynamic map, a byte a lane.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <limits>

#include "cpu/simd/inline.h"
#include "format/nf4_layout.h"

namespace qlora::simd {

/// The kernel of cpu_kernels.h.
template <typename Codec>
QLORA_INLINE void nf4_quantize_scales(const float* absmax, float offset, const NF4Bytes& out,
                                      std::int64_t begin, std::int64_t end) {
  using Simd = typename Codec::Simd;
  using Floats = typename Simd::Floats;
  constexpr std::int64_t group_size = nf4_blocks_per_nested_block;
  float centred[group_size];
  std::uint8_t codes[group_size];
  const std::int64_t block_count = out.block_count();
  for (std::int64_t group = begin; group < end; ++group) {
    const std::int64_t first = group * group_size;
    const std::int64_t left = block_count - first;
    const std::int64_t count = left < group_size ? left : group_size;
    typename Codec::Magnitudes magnitudes;
    for (std::int64_t i = 0; i < count; i += Simd::lanes) {
      const std::int64_t lanes = count - i < Simd::lanes ? count - i : Simd::lanes;
      const Floats scales = Simd::load_partial(absmax + first + i, lanes);
      Simd::store(centred + i, scales - Simd::broadcast(offset));
      magnitudes.grow(Simd::load_partial(centred + i, lanes));
    }
    const float group_absmax = std::bit_cast<float>(magnitudes.largest());
    std::memcpy(out.nested_absmax + 4 * group, &group_absmax, sizeof group_absmax);
    if (group_absmax == 0.0f) {
      std::memset(out.absmax + first, dynamic_map_signed_zero_code,
                  static_cast<std::size_t>(count));
      continue;
    }
    const float reciprocal = 1.0f / group_absmax;
    const bool multiplies = reciprocal <= std::numeric_limits<float>::max();  // as BlockNormalizer
    for (std::int64_t i = 0; i < count; i += Simd::lanes) {
      const Floats x = Simd::load(centred + i);
      Codec::encode_scales(
          multiplies ? x * Simd::broadcast(reciprocal) : x / Simd::broadcast(group_absmax),
          codes + i);
    }
    std::memcpy(out.absmax + first, codes, static_cast<std::size_t>(count));
  }
}

}  // namespace qlora::simd
