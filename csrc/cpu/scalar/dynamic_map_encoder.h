// DynamicMap::encode as one table look-up and one comparison, where a binary search takes eight
// branches that cannot be predicted: with it a step of 8-bit AdamW took 11 times as long.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <limits>

#include "format/dynamic_map.h"

namespace qlora::scalar {

/// Numbers of one sign that share their exponent and 7 upper mantissa bits share a bucket. A bucket
/// holds at most one midpoint of the map, so that its first code and one comparison give the code.
class DynamicMapEncoder {
 public:
  constexpr explicit DynamicMapEncoder(const DynamicMap& map) {
    std::copy(map.midpoints.begin(), map.midpoints.end(), midpoints_.begin());
    midpoints_.back() = std::numeric_limits<float>::infinity();
    for (std::uint32_t sign = 0; sign < 2; ++sign) {
      for (std::uint32_t bucket = 0; bucket < bucket_count; ++bucket) {
        const std::uint32_t upper = (sign << 15) + smallest_upper_bits + bucket;
        const float toward_zero = std::bit_cast<float>(bucket == 0 ? sign << 31 : upper << 16);
        const float away_from_zero = std::bit_cast<float>((upper << 16) | 0xffffu);
        const int first = map.encode(sign ? away_from_zero : toward_zero);
        const int last = map.encode(sign ? toward_zero : away_from_zero);
        if (last > first + 1) throw "a bucket holds two midpoints";
        first_code_[sign * bucket_count + bucket] = static_cast<std::uint8_t>(first);
      }
    }
  }

  /// map.encode(x) for x in [-1, 1]; the last code of its sign beyond.
  constexpr std::uint8_t operator()(float x) const {
    const std::uint32_t bits = std::bit_cast<std::uint32_t>(x);
    const std::uint32_t upper = std::clamp((bits >> 16) & 0x7fffu, smallest_upper_bits,
                                           smallest_upper_bits + bucket_count - 1);
    const std::uint32_t bucket = upper - smallest_upper_bits;
    const std::uint8_t first = first_code_[(bits >> 31) * bucket_count + bucket];
    return static_cast<std::uint8_t>(first + (x > midpoints_[first] ? 1 : 0));
  }

  // What it looks up, for encoders of whole vectors.

  // From 2^-22, below which no midpoint lies and everything is in the first bucket, to 1.
  static constexpr std::uint32_t smallest_upper_bits = (127 - 22) << 7;
  static constexpr std::uint32_t bucket_count = (22 << 7) + 1;

  /// One a bucket, those of negative numbers second. A gather may read 4 bytes at any of them: the
  /// midpoints come after.
  const std::uint8_t* first_codes() const { return first_code_.data(); }
  const float* midpoints() const { return midpoints_.data(); }

 private:
  std::array<std::uint8_t, 2 * bucket_count> first_code_{};
  std::array<float, dynamic_map_size> midpoints_{};  // the last one is Inf
};

inline constexpr DynamicMapEncoder signed_dynamic_map_encoder{signed_dynamic_map};
inline constexpr DynamicMapEncoder unsigned_dynamic_map_encoder{unsigned_dynamic_map};

}  // namespace qlora::scalar
