// The innermost product: up to 6 rows of one operand with 8 or 16 columns of the other, all sums in
// registers (12 of 16; 2 for the columns, 1 for a broadcast element of a row).
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "cpu/simd/inline.h"

namespace qlora::avx2 {
namespace {

constexpr std::int64_t tile_rows = 6;
constexpr std::int64_t tile_columns = 16;

// Inner elements of a slab, the part of both operands that is worked on at a time. A column tile's
// is 16 KB and stays in L1 while row tiles of 6 KB stream through it.
constexpr std::int64_t slab_depth = 256;

/// A product within a slab. Rows are slab_depth floats apart, inner elements of columns and rows of
/// sums 16.
struct TileProduct {
  const float* rows;
  const float* columns;
  float* sums;
  std::int64_t row_count;  // 1 to 6
  std::int64_t depth;      // up to slab_depth
  bool is_narrow;          // only the first 8 columns matter
  bool is_first;           // write, where otherwise the product is added
};

template <int row_count, int vectors>
void multiply_rows(const TileProduct& p) {
  __m256 sums[row_count][vectors];
#pragma GCC unroll 6
  for (int i = 0; i < row_count; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) {
      sums[i][v] =
          p.is_first ? _mm256_setzero_ps() : _mm256_load_ps(p.sums + i * tile_columns + v * 8);
    }
  }
  const float* rows = p.rows;
  const float* columns = p.columns;
#pragma GCC unroll 4
  for (std::int64_t d = 0; d < p.depth; ++d) {
    __m256 column[vectors];
    for (int v = 0; v < vectors; ++v) column[v] = _mm256_load_ps(columns + v * 8);
#pragma GCC unroll 6
    for (int i = 0; i < row_count; ++i) {
      const __m256 element = _mm256_broadcast_ss(rows + i * slab_depth);
      for (int v = 0; v < vectors; ++v) {
        sums[i][v] = _mm256_fmadd_ps(element, column[v], sums[i][v]);
      }
    }
    ++rows;
    columns += tile_columns;
  }
#pragma GCC unroll 6
  for (int i = 0; i < row_count; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) {
      _mm256_store_ps(p.sums + i * tile_columns + v * 8, sums[i][v]);
    }
  }
}

template <int vectors>
void multiply(const TileProduct& p) {
  switch (p.row_count) {
    case 1: return multiply_rows<1, vectors>(p);
    case 2: return multiply_rows<2, vectors>(p);
    case 3: return multiply_rows<3, vectors>(p);
    case 4: return multiply_rows<4, vectors>(p);
    case 5: return multiply_rows<5, vectors>(p);
    default: return multiply_rows<6, vectors>(p);
  }
}

inline void multiply(const TileProduct& p) { p.is_narrow ? multiply<1>(p) : multiply<2>(p); }

}  // namespace
}  // namespace qlora::avx2
