// The two 16-bit floating-point types as bits, with conversions that round to nearest even, on host
// and device.
#pragma once

#include <bit>
#include <cstdint>

#include "format/host_device.h"

namespace qlora {

/// bfloat16: the upper half of an fp32.
struct BFloat16 {
  std::uint16_t bits;
};

/// IEEE 754 binary16: 5 exponent bits, 10 mantissa bits.
struct Float16 {
  std::uint16_t bits;
};

QLORA_HOST_DEVICE constexpr float to_float(float x) { return x; }

QLORA_HOST_DEVICE constexpr float to_float(BFloat16 x) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(x.bits) << 16);
}

QLORA_HOST_DEVICE constexpr float to_float(Float16 x) {
  const std::uint32_t sign = (x.bits & 0x8000u) << 16;
  const std::uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) {  // Inf or NaN: the exponent field becomes all ones
    return std::bit_cast<float>(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  }
  // Shifted into place the exponent is 112 too small; the exact product by 2^112 mends normal and
  // subnormal alike.
  const float value = std::bit_cast<float>(magnitude << 13) * 0x1p112f;
  return std::bit_cast<float>(std::bit_cast<std::uint32_t>(value) | sign);
}

/// Rounds an fp32 to `T`, ties to even; overflow gives Inf, NaN stays NaN.
template <typename T>
QLORA_HOST_DEVICE constexpr T from_float(float x) = delete;

template <>
QLORA_HOST_DEVICE constexpr float from_float<float>(float x) {
  return x;
}

template <>
QLORA_HOST_DEVICE constexpr BFloat16 from_float<BFloat16>(float x) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fc0u};
  return {static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

template <>
QLORA_HOST_DEVICE constexpr Float16 from_float<Float16>(float x) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(x);
  const std::uint16_t sign = static_cast<std::uint16_t>((bits >> 16) & 0x8000u);
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<std::uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u)
    return {static_cast<std::uint16_t>(sign | 0x7c00u)};  // 65520 and up
  if (magnitude < 0x38800000u) {
    // Below 2^-14: adding 0.5 lines the result's last bit (2^-24) up with the sum's, which rounds
    // to even for us.
    const float aligned = std::bit_cast<float>(magnitude) + 0.5f;
    return {
        static_cast<std::uint16_t>(sign | (std::bit_cast<std::uint32_t>(aligned) - 0x3f000000u))};
  }
  const std::uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return {static_cast<std::uint16_t>(sign | ((rounded - 0x38000000u) >> 13))};
}

/// The value of `x` after it has passed through `T`.
template <typename T>
QLORA_HOST_DEVICE constexpr float round_through(float x) {
  return to_float(from_float<T>(x));
}

}  // namespace qlora
