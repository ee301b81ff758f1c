// A moment of 8-bit state, read by the published maps.
#pragma once

#include <algorithm>
#include <cmath>

#include "support/golden.h"
#include "support/host_tensor.h"

namespace qlora {

struct StoredMoment {
  static constexpr std::int64_t block = 256;

  std::vector<double> map;
  HostTensor codes, absmax;

  /// Zeros.
  static StoredMoment first(std::int64_t count) { return {"dynamic_map_signed.bin", 127, count}; }
  static StoredMoment second(std::int64_t count) { return {"dynamic_map_unsigned.bin", 0, count}; }

  double decode(std::int64_t i) const {
    const std::uint8_t code = codes.bytes()[static_cast<std::size_t>(i)];
    return reference::round_to(reference::float32_format, map[code] * absmax[i / block]);
  }

  /// The stored code is an entry nearest to value / absmax, allowing for `error` in the value.
  void expect_nearest(std::int64_t i, double value, double error) const {
    const double scale = absmax[i / block];
    const double x = value / scale;
    double nearest = HUGE_VAL;
    for (const double entry : map) nearest = std::min(nearest, std::fabs(entry - x));
    const double entry = map[codes.bytes()[static_cast<std::size_t>(i)]];
    // Both distances shift by the value's error; the reciprocal, its product and the midpoint
    // round.
    const double doubt = 2.0 * error / scale + 4.0 * reference::fp32_unit * std::fabs(x);
    EXPECT_LE(std::fabs(entry - x), nearest + doubt) << "element " << i;
  }

 private:
  StoredMoment(const char* map_file, double zero_code, std::int64_t count)
      : map(read_golden_floats(map_file)),
        codes(DType::uint8, {count},
              std::vector<double>(static_cast<std::size_t>(count), zero_code)),
        absmax(DType::float32, {(count + block - 1) / block},
               std::vector<double>(static_cast<std::size_t>((count + block - 1) / block))) {}
};

}  // namespace qlora
