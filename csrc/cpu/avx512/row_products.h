// Products of tiles by vector instructions: 8 rows of W stay in registers as sums, each weight is
// broadcast against one or two columns of 16.
#pragma once

#include "cpu/avx512/tile_layout.h"

namespace qlora::avx512 {
namespace {

/// 8 rows from `row` on of one row tile, with all column tiles.
template <typename Engine, int column_tiles>
QLORA_INLINE void multiply_eight_rows(const TileProduct& p, std::int64_t row_tile,
                                      std::int64_t row) {
  __m512 sums[8][column_tiles];
  float* const out = p.sums + row_tile * p.sums_row_stride + row * 16;
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
#pragma GCC unroll 2
    for (int c = 0; c < column_tiles; ++c) {
      sums[i][c] =
          p.is_first ? _mm512_setzero_ps() : _mm512_load_ps(out + c * tile_floats + i * 16);
    }
  }
  const float* a = p.a + row_tile * p.a_stride + row * 16;
  const float* b = p.b;
  for (std::int64_t tile = 0; tile < p.inner_tiles; ++tile) {
#pragma GCC unroll 2
    for (int d = 0; d < 16; ++d) {
      __m512 columns[column_tiles];
      for (int c = 0; c < column_tiles; ++c) {
        columns[c] = _mm512_load_ps(b + c * p.b_stride + d * 16);
      }
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        const auto weight = Engine::broadcast(a[i * 16 + d]);
        for (int c = 0; c < column_tiles; ++c) {
          sums[i][c] = Engine::accumulate(sums[i][c], weight, columns[c]);
        }
      }
    }
    a += tile_floats;
    b += tile_floats;
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
#pragma GCC unroll 2
    for (int c = 0; c < column_tiles; ++c) {
      _mm512_store_ps(out + c * tile_floats + i * 16, sums[i][c]);
    }
  }
}

/// sums[row tile][column tile] += A · B over `inner_tiles` tiles, or = where `is_first`.
///
/// `Engine::broadcast` spreads a dword of A, `Engine::accumulate` adds its products with 16 dwords
/// of B.
template <typename Engine>
void multiply_row_tiles(const TileProduct& p) {
  for (std::int64_t r = 0; r < p.row_tiles; ++r) {
    for (std::int64_t row = 0; row < 16 && r * 16 + row < p.row_count; row += 8) {
      if (p.column_tiles == 2) {
        multiply_eight_rows<Engine, 2>(p, r, row);
      } else {
        multiply_eight_rows<Engine, 1>(p, r, row);
      }
    }
  }
}

}  // namespace
}  // namespace qlora::avx512
