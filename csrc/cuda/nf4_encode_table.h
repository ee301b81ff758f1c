// nf4_encode as one table look-up and one comparison.
//
// nvcc makes some 130 instructions of nf4_encode itself: its tables become chains of selects. At
// the bandwidth of an H200's memory a quantiser of 16-bit weights can afford 17 an element in all.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include "format/nf4.h"

namespace qlora::cuda {

inline constexpr int nf4_bin_count = 32;  // one a lane of a warp

/// The bin of `x`, in the low 5 bits of what it returns: round(15 x) + 16, which is 1 to 31 for x
/// in [-1, 1].
///
/// 2^23 leaves the sum no fraction bits, so that its rounding is the one wanted. Rounding is
/// monotone, hence so are the bins.
QLORA_HOST_DEVICE inline std::uint32_t nf4_bin(float x) {
  return std::bit_cast<std::uint32_t>(fmaf(x, 15.0f, 0x1p23f + 16.0f));
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

}  // namespace qlora::cuda
