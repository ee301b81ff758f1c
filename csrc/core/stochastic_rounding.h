// Stochastic rounding of an fp32 to bfloat16: up or down with probabilities that make the expected
// value the fp32 itself, so that updates below half of a parameter's last place are not lost (Gupta
// et al. 2015, "Deep Learning with Limited Numerical Precision", section 3.1).
#pragma once

#include <bit>
#include <cstdint>

#include "core/philox.h"
#include "format/float16.h"

namespace qlora {

/// The random bits of one step of one tensor, of which element e uses 16: half e mod 8 (lower ones
/// first) of the 4 words that Philox makes of
///
///   key      seed
///   counter  (number · 2^40 + e / 8, step, 0)      64, 32 and 32 bits
///
/// where `number` is the parameter's, below 2^24, and e counts from the parameter's first element.
/// The same bits on every device, for any split of the work; and a resumed run goes on with them.
struct RoundingStream {
  std::uint64_t seed;
  std::uint64_t first_counter;  // of the first element at hand
  std::uint32_t step;

  static constexpr int elements_per_counter = 8;
  static constexpr std::int64_t max_number = (std::int64_t{1} << 24) - 1;

  /// The counter of a parameter's element, which is a multiple of 8.
  static constexpr std::uint64_t counter_of(std::int64_t number, std::int64_t element) {
    return (static_cast<std::uint64_t>(number) << 40) +
           static_cast<std::uint64_t>(element / elements_per_counter);
  }

  /// Of elements 8 i to 8 i + 7.
  QLORA_HOST_DEVICE constexpr PhiloxWords words_of_eight(std::uint64_t i) const {
    const std::uint64_t counter = first_counter + i;
    return philox4x32({{static_cast<std::uint32_t>(counter),
                        static_cast<std::uint32_t>(counter >> 32), step, 0u}},
                      seed);
  }

  QLORA_HOST_DEVICE static constexpr std::uint32_t half_of(const PhiloxWords& words, int i) {
    return words.word[i / 2] >> (i % 2 * 16) & 0xffffu;
  }
};

/// Away from zero with the probability of what is cut off, in units of the last place: 16 random
/// bits are added below it. What is exact stays, and so do Inf and NaN.
QLORA_HOST_DEVICE constexpr BFloat16 round_stochastically(float x, std::uint32_t random) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fc0u};
  return {static_cast<std::uint16_t>((bits + random) >> 16)};
}

}  // namespace qlora
