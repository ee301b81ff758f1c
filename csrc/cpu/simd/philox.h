// Philox (core/philox.h), the counters of a whole register at a time: a lane is a counter.
#pragma once

#include <cstdint>

#include "cpu/simd/inline.h"

namespace qlora::simd {

/// The words of `Simd::lanes` counters from `first` on, one counter's after the other. All counters
/// have the same `upper` 64 bits, words 2 and 3.
template <typename Simd>
QLORA_INLINE void philox_words(std::uint64_t first, std::uint64_t upper, std::uint64_t seed,
                               std::uint32_t* words) {
  using Ints = typename Simd::Ints;
  // A register's counters may differ in their word 1, where word 0 wraps around.
  alignas(64) std::uint32_t words0[Simd::lanes], words1[Simd::lanes];
  for (int i = 0; i < Simd::lanes; ++i) {
    words0[i] = static_cast<std::uint32_t>(first + static_cast<std::uint64_t>(i));
    words1[i] = static_cast<std::uint32_t>((first + static_cast<std::uint64_t>(i)) >> 32);
  }
  Ints word0 = Simd::load_ints(words0), word1 = Simd::load_ints(words1);
  Ints word2 = Simd::broadcast_int(static_cast<std::uint32_t>(upper));
  Ints word3 = Simd::broadcast_int(static_cast<std::uint32_t>(upper >> 32));
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

}  // namespace qlora::simd
