// Tables of the two dynamic maps for kernels that look many codes up at once: the values for decoding,
// and for encoding one 32-bit entry a bucket that holds both the bucket's first code and the
// midpoint inside it.
//
// A magnitude's key is its fp32 bits rotated left by one: exponent, mantissa, sign. Less the key of
// 2^-22, below which no midpoint lies, its bits from `shift` up are a bucket of the map, and the
// rest is the place in the bucket, with the sign as the last bit. An entry is chosen so that
//
//   code = (entry + key) >> shift
//
// where the sum carries out of the lower bits, and so raises the code by one, if the place is
// beyond the midpoint. A midpoint has no sign bit: a negative number on it counts as beyond, which
// is what sends ties to the lower code on both sides of zero.
#pragma once

#include <array>
#include <bit>
#include <cstdint>

#include "format/dynamic_map.h"

namespace qlora {

// The upper 16 bits of a key: 8 of exponent, 8 of mantissa. 2^-22 is the first, 1 the last bucket.
inline constexpr std::uint32_t dynamic_map_first_key_word = (127 - 22) << 8;
inline constexpr std::uint32_t dynamic_map_last_key_word = 22 << 8;  // less the first

/// `shift` is the largest with which no bucket holds two midpoints.
template <int shift_>
struct DynamicMapTable {
  static constexpr int shift = shift_;
  static constexpr std::uint32_t bucket_count = (dynamic_map_last_key_word >> (shift - 16)) + 1;

  alignas(64) std::array<float, dynamic_map_size> values;
  /// By bucket of a magnitude. The code of a negative number is 254 less that of its magnitude, but
  /// at least 0 (signed map), or the least (unsigned map).
  alignas(64) std::array<std::uint32_t, bucket_count> entries;

  /// Of `map`, whose codes below `least_code` are not given.
  explicit constexpr DynamicMapTable(const DynamicMap& map, int least_code)
      : values(map.values), entries{} {
    constexpr std::uint32_t place_mask = (1u << shift) - 1;
    for (std::uint32_t bucket = 0; bucket < bucket_count; ++bucket) {
      const std::uint32_t first_bits =
          ((dynamic_map_first_key_word << 16) + (bucket << shift)) >> 1;
      // Bucket 0 also takes what is smaller, and the last what is larger, NaN included.
      const float first_value = bucket == 0 ? 0.0f : std::bit_cast<float>(first_bits);
      const float last_value =
          bucket == bucket_count - 1 ? 1.0f : std::bit_cast<float>(first_bits + (place_mask >> 1));
      const int first = clamp_code(map.encode(first_value), least_code);
      const int last = clamp_code(map.encode(last_value), least_code);
      entries[bucket] = (static_cast<std::uint32_t>(first) - bucket) << shift;
      if (last == first) continue;
      if (last > first + 1 || bucket == 0) throw "a bucket holds too many midpoints";
      const float midpoint = map.midpoints[static_cast<std::size_t>(first)];
      const std::uint32_t place = (std::bit_cast<std::uint32_t>(midpoint) << 1) & place_mask;
      entries[bucket] += place_mask - place;
    }
  }

 private:
  static constexpr int clamp_code(int code, int least_code) {
    return code < least_code ? least_code : code;
  }
};

// 64 and 128 values of the widest decade, [0.1, 1], want 64 and 128 buckets for a power of two.
using SignedDynamicMapTable = DynamicMapTable<18>;
using UnsignedDynamicMapTable = DynamicMapTable<17>;

constexpr SignedDynamicMapTable make_signed_dynamic_map_table() {
  return SignedDynamicMapTable(signed_dynamic_map, 0);
}

/// Without code 0, which stands for no number but zero (cpu/scalar/optimizer.cpp says why).
constexpr UnsignedDynamicMapTable make_unsigned_dynamic_map_table() {
  return UnsignedDynamicMapTable(unsigned_dynamic_map, dynamic_map_unsigned_zero_code + 1);
}

}  // namespace qlora
