// nf4_encode as one table look-up and one comparison.
//
// For code that encodes many elements at once. nvcc makes some 130 instructions of nf4_encode
// itself: its tables become chains of selects. At the bandwidth of an H200's memory a quantiser of
// 16-bit weights can afford 17 an element in all. AVX-512 looks 32 bins up in one instruction.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include "format/nf4.h"

namespace qlora {

inline constexpr int nf4_bin_count = 32;  // one a lane of a warp, or two registers of 16

/// The bin of `x` is round(x * nf4_bins_per_unit + nf4_bin_rounder): 2^23 leaves the sum, which is
/// rounded once, no fraction bits; its low 5 bits are round(15 x) + 16.
inline constexpr float nf4_bins_per_unit = 15.0f;
inline constexpr float nf4_bin_rounder = 0x1p23f + 16.0f;

/// The bin of `x`, in the low 5 bits of what it returns: round(15 x) + 16, which is 1 to 31 for x
/// in [-1, 1].
///
/// Rounding is monotone, hence so are the bins.
QLORA_HOST_DEVICE inline std::uint32_t nf4_bin(float x) {
  return std::bit_cast<std::uint32_t>(fmaf(x, nf4_bins_per_unit, nf4_bin_rounder));
}

/// As no bin holds two thresholds:  nf4_encode(x) = base[nf4_bin(x)] + (x > threshold[nf4_bin(x)]).
struct NF4EncodeTable {
  float threshold[nf4_bin_count];     // the threshold within the bin, or Inf
  std::uint32_t base[nf4_bin_count];  // how many thresholds lie in lower bins
};

namespace detail {

// A threshold is so far from the edge of its bin that the last bits of the sum in nf4_bin do not
// matter.
constexpr int bin_of_threshold(float threshold) {
  const double position = 15.0 * static_cast<double>(threshold) + 16.5;
  const int bin = static_cast<int>(position);
  const double distance = position - bin;
  if (distance < 1e-3 || distance > 1.0 - 1e-3) throw "a threshold is at the edge of its bin";
  return bin;
}

constexpr NF4EncodeTable make_nf4_encode_table() {
  NF4EncodeTable table{};
  for (float& threshold : table.threshold) threshold = std::numeric_limits<float>::infinity();
  for (int i = 0; i + 1 < nf4_level_count; ++i) {
    const int bin = bin_of_threshold(nf4_threshold(i));
    if (table.threshold[bin] != std::numeric_limits<float>::infinity()) {
      throw "two thresholds are in one bin";
    }
    table.threshold[bin] = nf4_threshold(i);
    for (int higher = bin + 1; higher < nf4_bin_count; ++higher) ++table.base[higher];
  }
  return table;
}

}  // namespace detail

inline constexpr NF4EncodeTable nf4_encode_table = detail::make_nf4_encode_table();

}  // namespace qlora
