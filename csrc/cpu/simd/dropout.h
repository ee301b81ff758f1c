// Dropout by Philox (core/philox.h), the counters of a whole register at a time. A lane is a
// counter; the four words of each go to four elements in turn.
#pragma once

#include <cstring>

#include "core/operations.h"
#include "core/philox.h"
#include "cpu/simd/float_type.h"

namespace qlora::simd {

/// The words of `Simd::lanes` counters from `first`, in the order of the elements that use them.
template <typename Simd>
QLORA_INLINE void philox_words(std::uint64_t first, std::uint64_t seed,
                               std::uint32_t (&words)[4 * Simd::lanes]) {
  using Ints = typename Simd::Ints;
  // A register's counters may differ in their upper halves, where the lower one wraps around.
  alignas(64) std::uint32_t lower[Simd::lanes], upper[Simd::lanes];
  for (int i = 0; i < Simd::lanes; ++i) {
    lower[i] = static_cast<std::uint32_t>(first + static_cast<std::uint64_t>(i));
    upper[i] = static_cast<std::uint32_t>((first + static_cast<std::uint64_t>(i)) >> 32);
  }
  Ints word0 = Simd::load_ints(lower), word1 = Simd::load_ints(upper);
  Ints word2 = Simd::broadcast_int(0), word3 = Simd::broadcast_int(0);
  std::uint32_t key0 = static_cast<std::uint32_t>(seed);
  std::uint32_t key1 = static_cast<std::uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const auto product0 = Simd::multiply_wide(word0, 0xD2511F53u);
    const auto product1 = Simd::multiply_wide(word2, 0xCD9E8D57u);
    word0 = product1.upper ^ word1 ^ Simd::broadcast_int(key0);
    word1 = product1.lower;
    word2 = product0.upper ^ word3 ^ Simd::broadcast_int(key1);
    word3 = product0.lower;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  Simd::store_transposed(words, word0, word1, word2, word3);
}

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
      philox_words<Simd>(static_cast<std::uint64_t>(e / 4), static_cast<std::uint64_t>(seed),
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
