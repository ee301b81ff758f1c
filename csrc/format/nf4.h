// NF4, the 4-bit NormalFloat of QLoRA (Dettmers et al. 2023, section 3 and appendix E): the only
// copy of its numbers.
//
// A weight block is stored as its absolute maximum and, for each element, the code of the level
// nearest to element / absmax. The levels are the quantiles of a standard normal, scaled to [-1,
// 1], with an exact zero.
#pragma once

#include <cstdint>

#include "format/host_device.h"

namespace qlora {

inline constexpr int nf4_level_count = 16;
inline constexpr int nf4_zero_code = 7;  // decodes to +0.0

/// The value of a code, in units of the block's absmax. `code` must be 0 to 15.
QLORA_HOST_DEVICE constexpr float nf4_level(int code) {
  constexpr float levels[nf4_level_count] = {
      -1.0f,
      -0.6961928009986877f,
      -0.5250730514526367f,
      -0.39491748809814453f,
      -0.28444138169288635f,
      -0.18477343022823334f,
      -0.09105003625154495f,
      0.0f,
      0.07958029955625534f,
      0.16093020141124725f,
      0.24611230194568634f,
      0.33791524171829224f,
      0.44070982933044434f,
      0.5626170039176941f,
      0.7229568362236023f,
      1.0f,
  };
  return levels[code];
}

/// The fp32 midpoint between levels `i` and `i + 1`, for i from 0 to 14.
QLORA_HOST_DEVICE constexpr float nf4_threshold(int i) {
  return (nf4_level(i) + nf4_level(i + 1)) / 2.0f;
}

/// The code whose level is nearest to `x`, which is in units of absmax; a tie goes to the lower code.
QLORA_HOST_DEVICE constexpr int nf4_encode(float x) {
  int code = 0;  // a binary search: four comparisons find the number of thresholds below x
  for (int step = 8; step > 0; step /= 2) {
    if (x > nf4_threshold(code + step - 1)) code += step;
  }
  return code;
}

}  // namespace qlora
