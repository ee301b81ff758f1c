// The tiles that a product works on: 16 x 16 dwords, 1 KB.
//
//   row tile      16 rows of 16 dwords of the inner dimension     (left operand)
//   column tile   16 dwords of the inner dimension of 16 columns  (right operand)
//
// A dword is one fp32 or a pair of bf16. An operand is [tile][inner tile]; the sums are fp32 [row
// tile][column tile].
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "cpu/simd/inline.h"

namespace qlora::avx512 {
namespace {

constexpr std::int64_t tile_floats = 256;  // dwords, rather

/// A product of 1 or 2 row tiles and 1 or 2 column tiles. Strides are in dwords.
struct TileProduct {
  const float* a;
  const float* b;
  float* sums;
  std::int64_t a_stride, b_stride, sums_row_stride;  // from tile to tile
  std::int64_t row_tiles, column_tiles, inner_tiles;
  std::int64_t row_count;  // rows that matter; the others may be left out
  bool is_first;           // write, where otherwise the product is added
};

/// In every 128-bit lane: out[j] = dword j of rows[0..3].
QLORA_INLINE void transpose_4x4_in_lanes(const __m512* rows, __m512 (&out)[4]) {
  const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(rows[0], rows[1]));
  const __m512d b = _mm512_castps_pd(_mm512_unpackhi_ps(rows[0], rows[1]));
  const __m512d c = _mm512_castps_pd(_mm512_unpacklo_ps(rows[2], rows[3]));
  const __m512d d = _mm512_castps_pd(_mm512_unpackhi_ps(rows[2], rows[3]));
  out[0] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
  out[1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
  out[2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
  out[3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
}

/// out[i] = lane i of rows[0..3].
QLORA_INLINE void transpose_lanes(const __m512 (&rows)[4], __m512 (&out)[4]) {
  const __m512 even0 = _mm512_shuffle_f32x4(rows[0], rows[1], 0x88);
  const __m512 odd0 = _mm512_shuffle_f32x4(rows[0], rows[1], 0xdd);
  const __m512 even1 = _mm512_shuffle_f32x4(rows[2], rows[3], 0x88);
  const __m512 odd1 = _mm512_shuffle_f32x4(rows[2], rows[3], 0xdd);
  out[0] = _mm512_shuffle_f32x4(even0, even1, 0x88);
  out[1] = _mm512_shuffle_f32x4(odd0, odd1, 0x88);
  out[2] = _mm512_shuffle_f32x4(even0, even1, 0xdd);
  out[3] = _mm512_shuffle_f32x4(odd0, odd1, 0xdd);
}

}  // namespace
}  // namespace qlora::avx512
