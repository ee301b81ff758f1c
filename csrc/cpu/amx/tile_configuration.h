// All tiles as the kernels of this set use them.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "cpu/simd/inline.h"

namespace qlora::amx {
namespace {

/// The operand of ldtilecfg (Intel SDM volume 1, table 18-1): all eight tiles 16 rows of 64 bytes.
struct alignas(64) TileConfiguration {
  std::uint8_t palette = 1;
  std::uint8_t start_row = 0;
  std::uint8_t reserved[14] = {};
  std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfiguration) == 64);

QLORA_INLINE void configure_tiles() {
  static constexpr TileConfiguration configuration;
  _tile_loadconfig(&configuration);
}

/// Before tile loads: the compiler does not see that they read memory (GCC's _tile_loadd has no
/// clobber), and might store later what they are to load.
QLORA_INLINE void publish_stores() { __asm__ volatile("" ::: "memory"); }

}  // namespace
}  // namespace qlora::amx
