// Tiles of pairs of bfloat16: all that cpu/avx512/tile_product.h asks of an engine but the product
// itself. Only sources that are compiled for AVX512-BF16 may include it.
//
// Its instructions take subnormal bfloat16 and fp32 as zeros.
#pragma once

#include "cpu/avx512/nf4_decode.h"
#include "cpu/avx512/tile_layout.h"
#include "cpu/avx512/transpose.h"

namespace qlora::avx512 {
namespace {

/// The weights of a chunk in bf16: planes[s] word w is column 4 w + (s ^ 1). The first 64 have
/// scale0, the others scale1.
QLORA_INLINE void decode_bfloat16(__m512i codes, float scale0, float scale1, __m512i (&planes)[4]) {
  const __m512 levels = _mm512_load_ps(nf4_levels);
  const __m512i tables = (__m512i)_mm512_cvtne2ps_pbh(
      _mm512_mul_ps(levels, _mm512_set1_ps(scale1)), _mm512_mul_ps(levels, _mm512_set1_ps(scale0)));
  const __m512i nibble = _mm512_set1_epi16(0x0f);
  // Index bit 4 chooses the table.
  const __m512i table = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(0x10), 1);
#pragma GCC unroll 4
  for (int s = 0; s < 4; ++s) {
    const __m512i index = _mm512_ternarylogic_epi32(
        _mm512_srli_epi16(codes, static_cast<unsigned>(4 * s)), nibble, table, 0xea);
    planes[s] = _mm512_permutexvar_epi16(index, tables);
  }
}

struct BFloat16Tiles {
  using Activation = BFloat16;
  using Simd = avx512::Simd;
  static constexpr std::int64_t inner_per_tile = 32;
  static constexpr std::int64_t tiles_per_inner_chunk = 4;
  static constexpr std::int64_t tiles_per_column_chunk = 8;

  /// Columns [0, 128) of up to 16 tokens, `count` of them there and `width` of the columns, as
  /// column tiles: tile s, row i, column t is the pair x[t][8 i + (s ^ 1)], x[t][8 i + 4 + (s ^ 1)].
  static void pack_columns(const BFloat16* x, std::int64_t stride, std::int64_t count,
                           std::int64_t width, float* tiles) {
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    for (std::int64_t part = 0; part < 4; ++part) {  // of 32 columns, 16 dwords
      __m512i t[16];
      load_rows(x + 32 * part, stride, count, width - 32 * part, t);
      transpose16(t);
      for (std::int64_t q = 0; q < 4; ++q) {
        for (std::int64_t half = 0; half < 2; ++half) {  // elements 2 half and 2 half + 1 of four
          const __m512i first = t[4 * q + half], second = t[4 * q + 2 + half];
          const __m512i low =
              _mm512_mask_blend_epi16(0xaaaaaaaau, first, _mm512_slli_epi32(second, 16));
          const __m512i high =
              _mm512_or_si512(_mm512_srli_epi32(first, 16), _mm512_and_si512(second, upper));
          const std::int64_t i = 4 * part + q;
          _mm512_store_si512(tiles + (2 * half + 1) * tile_floats + i * 16, low);
          _mm512_store_si512(tiles + 2 * half * tile_floats + i * 16, high);
        }
      }
    }
  }

  // -- for few_tokens.h and row_products.h

  static constexpr int planes = 4;
  using Planes = __m512i[4];
  QLORA_INLINE static void decode(__m512i codes, float scale0, float scale1, Planes& out) {
    decode_bfloat16(codes, scale0, scale1, out);
  }
  QLORA_INLINE static __m512i broadcast(float weights) {
    return _mm512_castps_si512(_mm512_set1_ps(weights));
  }
  QLORA_INLINE static __m512 accumulate(__m512 sum, __m512i weights, __m512 activations) {
    return _mm512_dpbf16_ps(sum, (__m512bh)weights, (__m512bh)activations);
  }
  /// Up to 128 columns of one token, `width` of them there: plane s, word w is column 4 w + (s ^ 1).
  static void pack_chunk(const BFloat16* x, std::int64_t width, float* out) {
    auto* const words = reinterpret_cast<BFloat16*>(out);
    for (std::int64_t i = 0; i < chunk_weights; ++i) {
      words[(i % 4 ^ 1) * 32 + i / 4] = i < width ? x[i] : BFloat16{0};
    }
  }

  // -- for tile_product.h

  /// One row tile: 32 inner elements of up to 16 tokens.
  static void pack_rows(const BFloat16* dy, std::int64_t stride, std::int64_t count,
                        std::int64_t width, float* tile) {
    __m512i rows[16];
    load_rows(dy, stride, count, width, rows);
    for (int i = 0; i < 16; ++i) _mm512_store_si512(tile + 16 * i, rows[i]);
  }

  /// A chunk of up to 16 rows of W as 4 row tiles; or of up to `row_count`, as so many of their rows.
  template <int row_count = 16>
  QLORA_INLINE static void decode_rows(const ChunkOfRows& w, float* tiles) {
    w.is_whole ? decode_rows<row_count, true>(w, tiles) : decode_rows<row_count, false>(w, tiles);
  }

  /// A chunk of up to 32 rows of W as 8 column tiles, `tile_stride` dwords apart: tile 2 s + h, dword
  /// 4 L + j is column 32 L + 16 h + 4 j + (s ^ 1).
  static void decode_columns(const ChunkOfRows& w, float* tiles, std::int64_t tile_stride) {
    w.is_whole ? decode_columns<true>(w, tiles, tile_stride)
               : decode_columns<false>(w, tiles, tile_stride);
  }

  /// Sums of one token over the 8 column tiles of a chunk, into column order.
  QLORA_INLINE static void order_columns(const float* const (&tiles)[8], std::int64_t token,
                                         __m512 (&columns)[8]) {
    for (int h = 0; h < 2; ++h) {
      __m512 o[4], runs[4];  // runs[j] lane L: columns 32 L + 16 h + 4 j + 0..3
      for (int i = 0; i < 4; ++i) o[i] = _mm512_load_ps(tiles[2 * (i ^ 1) + h] + token * 16);
      transpose_4x4_in_lanes(o, runs);
      __m512 lanes[4];
      transpose_lanes(runs, lanes);
      for (int lane = 0; lane < 4; ++lane) columns[2 * lane + h] = lanes[lane];
    }
  }

 private:
  template <int row_count, bool is_whole>
  QLORA_INLINE static void decode_rows(const ChunkOfRows& w, float* tiles) {
    const std::uint8_t* codes = w.codes;
    const float* scales = w.scales;
    for (std::int64_t row = 0; row < w.rows; ++row) {
      __m512i planes[4];
      decode_bfloat16(load_codes<is_whole>(codes, w.ahead), scales[0], is_whole ? scales[1] : 0.0f,
                      planes);
#pragma GCC unroll 4
      for (int s = 0; s < 4; ++s) _mm512_store_si512(tiles + s * tile_floats + row * 16, planes[s]);
      codes += w.codes_stride;
      scales += w.scales_stride;
    }
    for (std::int64_t row = w.rows > 0 ? w.rows : 0; row < row_count; ++row) {
      for (int s = 0; s < 4; ++s) {
        _mm512_store_si512(tiles + s * tile_floats + row * 16, _mm512_setzero_si512());
      }
    }
  }

  template <bool is_whole>
  QLORA_INLINE static void decode_columns(const ChunkOfRows& w, float* tiles,
                                          std::int64_t tile_stride) {
    const std::uint8_t* codes = w.codes;
    const float* scales = w.scales;
    for (std::int64_t row = 0; row < 32; row += 2) {
      __m512i even[4] = {}, odd[4] = {};
      if (row < w.rows) {
        decode_bfloat16(load_codes<is_whole>(codes, w.ahead), scales[0],
                        is_whole ? scales[1] : 0.0f, even);
      }
      if (row + 1 < w.rows) {
        decode_bfloat16(load_codes<is_whole>(codes + w.codes_stride, w.ahead),
                        scales[w.scales_stride], is_whole ? scales[w.scales_stride + 1] : 0.0f,
                        odd);
      }
      float* out = tiles + row / 2 * 16;
#pragma GCC unroll 4
      for (int s = 0; s < 4; ++s, out += 2 * tile_stride) {
        _mm512_store_si512(out, _mm512_unpacklo_epi16(even[s], odd[s]));
        _mm512_store_si512(out + tile_stride, _mm512_unpackhi_epi16(even[s], odd[s]));
      }
      codes += 2 * w.codes_stride;
      scales += 2 * w.scales_stride;
    }
  }

  QLORA_INLINE static void load_rows(const BFloat16* x, std::int64_t stride, std::int64_t count,
                                     std::int64_t width, __m512i (&rows)[16]) {
    const std::int64_t there = width < 0 ? 0 : width < 32 ? width : 32;
    const auto mask = static_cast<__mmask32>((std::uint64_t{1} << there) - 1u);
    for (std::int64_t i = 0; i < 16; ++i) {
      rows[i] = i < count ? _mm512_maskz_loadu_epi16(mask, x + i * stride) : _mm512_setzero_si512();
    }
  }
};

}  // namespace
}  // namespace qlora::avx512
