// nf4_dequantize over the vectors of an instruction set. Its `Codec` has
//
//   Decoder<T>              of a block's scale: decode<Store>(codes, out) turns 16 bytes of codes
//                           into 32 elements
//   Cached, Streamed        the two kinds of Store; Streamed wants `out` aligned to a vector
//   fence()                 after the last streamed store
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/simd/inline.h"
#include "cpu/simd/prefetch.h"
#include "format/nf4_layout.h"

namespace qlora::simd {

// A copy for each set: signed_dynamic_map is one object for all.
constexpr auto scale_map = signed_dynamic_map.values;

/// Scales of blocks [begin, end), at most 256 of one group.
QLORA_INLINE void nf4_group_scales(const NF4Bytes& weight, std::int64_t begin, std::int64_t end,
                                   float* scales) {
  if (!weight.is_nested()) {
    std::memcpy(scales, weight.absmax + 4 * begin, static_cast<std::size_t>(4 * (end - begin)));
    return;
  }
  float group_absmax, offset;
  std::memcpy(&group_absmax, weight.nested_absmax + 4 * (begin / nf4_blocks_per_nested_block), 4);
  std::memcpy(&offset, weight.nested_offset, 4);
  const std::uint8_t* const q = weight.absmax + begin;
  for (std::int64_t i = 0; i < end - begin; ++i) {
    scales[i] = scale_map[q[i]] * group_absmax + offset;
  }
}

/// A block of `count` elements.
template <typename Codec, typename Store, typename T>
QLORA_INLINE void nf4_dequantize_block(float scale, const std::uint8_t* codes, std::int64_t count,
                                       T* out) {
  constexpr std::int64_t step = nf4_min_block_size;
  const typename Codec::template Decoder<T> decoder(scale);
  std::int64_t e = 0;
  for (; e + step <= count; e += step) decoder.template decode<Store>(codes + e / 2, out + e);
  if (e == count) return;
  std::uint8_t last_codes[step / 2] = {};
  T last[step];
  std::memcpy(last_codes, codes + e / 2, static_cast<std::size_t>(nf4_code_bytes(count - e)));
  decoder.template decode<typename Codec::Cached>(last_codes, last);
  std::memcpy(out + e, last, static_cast<std::size_t>(count - e) * sizeof(T));
}

template <typename Codec, typename Store, typename T>
QLORA_INLINE void nf4_dequantize_blocks(const NF4Bytes& weight, T* out, std::int64_t begin,
                                        std::int64_t end) {
  constexpr std::int64_t group_size = nf4_blocks_per_nested_block;
  const std::int64_t block_size = weight.block_size;
  const std::int64_t element_count = weight.element_count();
  float scales[group_size];
  for (std::int64_t first = begin; first < end;) {
    const std::int64_t group_end = (first / group_size + 1) * group_size;
    const std::int64_t last = group_end < end ? group_end : end;
    nf4_group_scales(weight, first, last, scales);
    for (std::int64_t block = first; block < last; ++block) {
      const std::int64_t e = block * block_size;
      const std::int64_t left = element_count - e;
      const std::int64_t count = left < block_size ? left : block_size;
      prefetch_ahead_of(weight.codes + e / 2, count / 2);
      nf4_dequantize_block<Codec, Store>(scales[block - first], weight.codes + e / 2, count,
                                         out + e);
    }
    first = last;
  }
}

/// Bytes of output from which stores go around the caches.
///
/// A cached store reads its line first, so that a large output costs twice its traffic; but one
/// that is read right after, as the workspace of a matmul is, is better found in the L2. Measured
/// on a Sapphire Rapids (two cores, 2 MB of L2 each), decoding to bf16 and torch.mm of 64 tokens:
/// 2048 x 512 takes 0.40 ms cached and 0.62 streamed, 4096 x 1024 1.69 and 1.97, 4096 x 4096 5.43
/// and 4.58.
inline constexpr std::int64_t nf4_streaming_bytes = std::int64_t{16} << 20;

/// The kernel of cpu_kernels.h for one dtype.
template <typename Codec, typename T>
QLORA_INLINE void nf4_dequantize(const NF4Bytes& weight, T* out, std::int64_t begin,
                                 std::int64_t end) {
  const bool is_aligned = reinterpret_cast<std::uintptr_t>(out) % Codec::Streamed::alignment == 0;
  const auto bytes = weight.element_count() * static_cast<std::int64_t>(sizeof(T));
  if (is_aligned && bytes >= nf4_streaming_bytes) {
    nf4_dequantize_blocks<Codec, typename Codec::Streamed>(weight, out, begin, end);
    Codec::fence();
  } else {
    nf4_dequantize_blocks<Codec, typename Codec::Cached>(weight, out, begin, end);
  }
}

}  // namespace qlora::simd
