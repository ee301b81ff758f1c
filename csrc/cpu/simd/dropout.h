// Dropout by Philox: the four words of each counter go to four elements in turn.
#pragma once

#include "core/operations.h"
#include "cpu/simd/float_type.h"
#include "cpu/simd/philox.h"

namespace qlora::simd {

template <typename Simd>
QLORA_INLINE void dropout(const TensorView& x, double p, std::int64_t seed, const TensorView& out,
                          std::int64_t begin, std::int64_t end) {
  constexpr std::int64_t words_at_once = 4 * Simd::lanes;
  // DropoutMask's members, by a constructor that would otherwise stay out of line.
  const auto drop_below = static_cast<std::uint64_t>(p * 4294967296.0);
  const auto keep_scale = Simd::broadcast(static_cast<float>(1.0 / (1.0 - p)));
  // p < 1, so that the bound fits in 32 bits.
  const auto bound = Simd::broadcast_int(static_cast<std::uint32_t>(drop_below));
  simd::with_float_type(x.dtype, [&]<typename T>(T) {
    const T* const in = x.as<const T>();
    T* const to = out.as<T>();
    alignas(64) std::uint32_t words[words_at_once];
    for (std::int64_t e = begin; e < end; e += words_at_once) {
      philox_words<Simd>(static_cast<std::uint64_t>(e / 4), 0, static_cast<std::uint64_t>(seed),
                         words);
      for (std::int64_t j = 0; j < words_at_once && e + j < end; j += Simd::lanes) {
        const std::int64_t count = end - e - j;
        const bool is_whole = count >= Simd::lanes;
        const auto value =
            is_whole ? Simd::load(in + e + j) : Simd::load_partial(in + e + j, count);
        const auto kept =
            Simd::keep_where_at_least(Simd::load_ints(words + j), bound, value * keep_scale);
        if (is_whole) {
          Simd::store(to + e + j, kept);
        } else {
          Simd::store_partial(to + e + j, kept, count);
        }
      }
    }
  });
}

}  // namespace qlora::simd
