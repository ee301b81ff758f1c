// Tiles of fp32 for AVX-512, of activations in any float dtype T: what tile_product.h asks
// of an engine.
#pragma once

#include "cpu/avx512/nf4_decode.h"
#include "cpu/avx512/row_products.h"
#include "cpu/avx512/tile_layout.h"
#include "cpu/avx512/transpose.h"

namespace qlora::avx512 {
namespace {

template <typename T>
struct FloatEngine {
  using Activation = T;
  using Simd = avx512::Simd;
  static constexpr std::int64_t inner_per_tile = 16;
  static constexpr std::int64_t tiles_per_inner_chunk = 8;
  static constexpr std::int64_t tiles_per_column_chunk = 8;

  static void begin() {}
  static void end() {}

  /// Columns [0, 128) of up to 16 tokens, `count` of them there and `width` of the columns, as
  /// column tiles: tile s, row d, column t is x[t][8 d + (s ^ 1)].
  static void pack_columns(const T* x, std::int64_t stride, std::int64_t count, std::int64_t width,
                           float* tiles) {
    for (std::int64_t first = 0; first < chunk_weights; first += 16) {
      __m512i rows[16];
      load_rows(x + first, stride, count, width - first, rows);
      transpose16(rows);
      for (std::int64_t i = 0; i < 16; ++i) {
        const std::int64_t d = (first + i) / 8, s = ((first + i) % 8) ^ 1;
        _mm512_store_si512(tiles + (s * 16 + d) * 16, rows[i]);
      }
    }
  }

  // -- for few_tokens.h and row_products.h

  static constexpr int planes = 8;
  using Planes = __m512[8];
  QLORA_INLINE static void decode(__m512i codes, float scale0, float scale1, Planes& out) {
    decode_floats<T>(codes, scale0, scale1, out);
  }
  QLORA_INLINE static __m512 broadcast(float weight) { return _mm512_set1_ps(weight); }
  QLORA_INLINE static __m512 accumulate(__m512 sum, __m512 weights, __m512 activations) {
    return _mm512_fmadd_ps(weights, activations, sum);
  }
  /// Up to 128 columns of one token, `width` of them there: plane s, lane d is column 8 d + (s ^ 1).
  static void pack_chunk(const T* x, std::int64_t width, float* out) {
    for (std::int64_t i = 0; i < chunk_weights; ++i) {
      out[(i % 8 ^ 1) * 16 + i / 8] = i < width ? to_float(x[i]) : 0.0f;
    }
  }

  // -- for tile_product.h

  /// One row tile: 16 inner elements of up to 16 tokens.
  static void pack_rows(const T* dy, std::int64_t stride, std::int64_t count, std::int64_t width,
                        float* tile) {
    __m512i rows[16];
    load_rows(dy, stride, count, width, rows);
    for (int i = 0; i < 16; ++i) _mm512_store_si512(tile + 16 * i, rows[i]);
  }

  /// A chunk of up to 16 rows of W as 8 row tiles.
  static void decode_rows(const ChunkOfRows& w, float* tiles) {
    w.is_whole ? decode<true>(w, tiles, tile_floats) : decode<false>(w, tiles, tile_floats);
  }

  /// A chunk of up to 16 rows of W as 8 column tiles, `tile_stride` floats apart: tile s, column d is
  /// column 8 d + (s ^ 1).
  static void decode_columns(const ChunkOfRows& w, float* tiles, std::int64_t tile_stride) {
    w.is_whole ? decode<true>(w, tiles, tile_stride) : decode<false>(w, tiles, tile_stride);
  }

  /// Sums of one token over the 8 column tiles of a chunk, into column order.
  QLORA_INLINE static void order_columns(const float* const (&tiles)[8], std::int64_t token,
                                         __m512 (&columns)[8]) {
    __m512 o[8];
    for (int i = 0; i < 8; ++i) o[i] = _mm512_load_ps(tiles[i ^ 1] + token * 16);
    __m512 low[4], high[4];  // [j] lane L: columns 8 (4 L + j) + 0..3, and + 4..7
    transpose_4x4_in_lanes(o, low);
    transpose_4x4_in_lanes(o + 4, high);
    for (int pair = 0; pair < 2; ++pair) {
      const __m512 rows[4] = {low[2 * pair], high[2 * pair], low[2 * pair + 1], high[2 * pair + 1]};
      __m512 lanes[4];
      transpose_lanes(rows, lanes);
      for (int lane = 0; lane < 4; ++lane) columns[2 * lane + pair] = lanes[lane];
    }
  }

  static void multiply(const TileProduct& p) { multiply_row_tiles<FloatEngine>(p); }

 private:
  template <bool is_whole>
  QLORA_INLINE static void decode(const ChunkOfRows& w, float* tiles, std::int64_t tile_stride) {
    const std::uint8_t* codes = w.codes;
    const float* scales = w.scales;
    for (std::int64_t row = 0; row < w.rows; ++row) {
      __m512 planes[8];
      decode_floats<T>(load_codes<is_whole>(codes, w.ahead), scales[0], is_whole ? scales[1] : 0.0f,
                       planes);
#pragma GCC unroll 8
      for (int s = 0; s < 8; ++s) _mm512_store_ps(tiles + s * tile_stride + row * 16, planes[s]);
      codes += w.codes_stride;
      scales += w.scales_stride;
    }
    for (std::int64_t row = w.rows; row < 16; ++row) {
      for (int s = 0; s < 8; ++s) {
        _mm512_store_ps(tiles + s * tile_stride + row * 16, _mm512_setzero_ps());
      }
    }
  }

  QLORA_INLINE static void load_rows(const T* x, std::int64_t stride, std::int64_t count,
                                     std::int64_t width, __m512i (&rows)[16]) {
    for (std::int64_t i = 0; i < 16; ++i) {
      if (i >= count || width <= 0) {
        rows[i] = _mm512_setzero_si512();
      } else if (width >= 16) {
        rows[i] = _mm512_castps_si512(Simd::load(x + i * stride).v);
      } else {
        rows[i] = _mm512_castps_si512(Simd::load_partial(x + i * stride, width).v);
      }
    }
  }
};

}  // namespace
}  // namespace qlora::avx512
