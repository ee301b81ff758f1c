// The 8-bit dynamic maps of block-wise quantisation (Dettmers et al. 2022, "8-bit Optimizers via
// Block-wise Quantization", section 2.2): the signed one holds nested NF4 scales and first moments,
// the unsigned one second moments.
//
// A map is 256 ascending fp32 values, denser near zero. Decade i of 7 holds the midpoints of an
// even division of [0.1, 1], times 10^(i-6): 2^i of them with both signs (signed), or 2^(i+1)
// (unsigned). Zero and 1.0 are added.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>

#include "format/host_device.h"

namespace qlora {

inline constexpr int dynamic_map_size = 256;
inline constexpr int dynamic_map_decades = 7;
inline constexpr std::uint8_t dynamic_map_signed_zero_code = 127;
inline constexpr std::uint8_t dynamic_map_unsigned_zero_code = 0;

namespace detail {

/// Element `i` of an fp32 linspace(0.1, 1, count) as torch computes it: from the nearer end.
constexpr float linspace_tenth_to_one(int i, int count) {
  const float start = 0.1f, end = 1.0f;
  const float step = (end - start) / static_cast<float>(count - 1);
  // The product and the sum are rounded once, as by a fused multiply-add; in fp64 the product is
  // exact.
  if (i < count / 2) {
    return static_cast<float>(static_cast<double>(start) + static_cast<double>(step) * i);
  }
  return static_cast<float>(static_cast<double>(end) - static_cast<double>(step) * (count - 1 - i));
}

constexpr std::array<float, dynamic_map_size> make_dynamic_map(bool is_signed) {
  std::array<float, dynamic_map_size> map{};
  std::size_t filled = 0;
  map[filled++] = 0.0f;
  map[filled++] = 1.0f;
  constexpr double decade_scale[dynamic_map_decades] = {1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0};
  for (int decade = 0; decade < dynamic_map_decades; ++decade) {
    const int midpoint_count = is_signed ? 1 << decade : 1 << (decade + 1);
    for (int i = 0; i < midpoint_count; ++i) {
      const float low = linspace_tenth_to_one(i, midpoint_count + 1);
      const float high = linspace_tenth_to_one(i + 1, midpoint_count + 1);
      const float value = static_cast<float>(decade_scale[decade]) * ((low + high) / 2.0f);
      map[filled++] = value;
      if (is_signed) map[filled++] = -value;
    }
  }
  std::sort(map.begin(), map.end());
  return map;
}

constexpr std::array<float, dynamic_map_size - 1> make_midpoints(
    const std::array<float, dynamic_map_size>& map) {
  std::array<float, dynamic_map_size - 1> midpoints{};
  for (std::size_t i = 0; i < midpoints.size(); ++i) midpoints[i] = (map[i] + map[i + 1]) / 2.0f;
  return midpoints;
}

}  // namespace detail

/// A map beside the fp32 midpoints between its neighbours, which are what encoding compares with.
struct DynamicMap {
  std::array<float, dynamic_map_size> values;
  std::array<float, dynamic_map_size - 1> midpoints;

  /// The code of the entry nearest to `x` in [-1, 1]; a tie goes to the lower code.
  constexpr std::uint8_t encode(float x) const {
    int code = 0;  // a binary search for the number of midpoints below x
    for (int step = dynamic_map_size / 2; step > 0; step /= 2) {
      if (x > midpoints[static_cast<std::size_t>(code + step - 1)]) code += step;
    }
    return static_cast<std::uint8_t>(code);
  }

  constexpr float decode(std::uint8_t code) const { return values[code]; }
};

constexpr DynamicMap make_dynamic_map_with_midpoints(bool is_signed) {
  const auto values = detail::make_dynamic_map(is_signed);
  return {values, detail::make_midpoints(values)};
}

/// From -0.99297 to 1.0, with 0 at index 127; there is no -1.0.
inline constexpr DynamicMap signed_dynamic_map = make_dynamic_map_with_midpoints(true);
/// From 0 at index 0 to 1.0.
inline constexpr DynamicMap unsigned_dynamic_map = make_dynamic_map_with_midpoints(false);

static_assert(signed_dynamic_map.values[dynamic_map_signed_zero_code] == 0.0f);
static_assert(unsigned_dynamic_map.values[dynamic_map_unsigned_zero_code] == 0.0f);

}  // namespace qlora
