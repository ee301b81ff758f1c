// Prefetching for kernels that stream through memory once.
#pragma once

#include <cstdint>

#include "cpu/simd/inline.h"

namespace qlora::simd {

/// Asks for the `bytes` that lie a little beyond `p`, which may be beyond the end of its array.
QLORA_INLINE void prefetch_ahead_of(const void* p, std::int64_t bytes) {
  // The quantiser did as well with anything from 2048 to 4096.
  constexpr std::uintptr_t distance = 2048;
  constexpr std::int64_t line = 64;
  const std::uintptr_t ahead = reinterpret_cast<std::uintptr_t>(p) + distance;
  for (std::int64_t i = 0; i < bytes; i += line) {
    __builtin_prefetch(reinterpret_cast<const void*>(ahead + static_cast<std::uintptr_t>(i)));
  }
}

}  // namespace qlora::simd
