// y = x · Wᵀ for up to 16 tokens: one column tile. The sums of two row tiles stay in tile registers
// for all of k, and a chunk is multiplied while the next one is decoded: the tile unit then costs the
// vector units nothing, and W is read at the speed of decoding.
#pragma once

#include "cpu/amx/tile_configuration.h"
#include "cpu/avx512/tile_product.h"
#include "cpu/avx512_bf16/bfloat16_tiles.h"

namespace qlora::amx {
namespace {

/// Row tiles `tile` and, if row_tiles is 2, the next one.
template <typename Engine, int row_tiles>
void forward_pair(const NF4Bytes& w, const float* scales, const float* packed, std::int64_t tile,
                  float* sums) {
  using avx512::tile_floats;
  constexpr std::int64_t chunk_bytes = chunk_weights / 2, tiles = Engine::tiles_per_inner_chunk;
  constexpr std::int64_t chunks_ahead = 2;
  constexpr int line = 64;
  const std::int64_t chunks = ceil_divide(w.k, chunk_weights);
  alignas(64) float decoded[2][2 * tiles * tile_floats];
  _tile_zero(0);
  if (row_tiles == 2) _tile_zero(1);
  const auto multiply = [&](std::int64_t c, std::int64_t s) __attribute__((always_inline)) {
    const float* const a = decoded[c % 2] + s * tile_floats;
    publish_stores();
    _tile_loadd(6, packed + (c * tiles + s) * tile_floats, line);
    _tile_loadd(4, a, line);
    _tile_dpbf16ps(0, 4, 6);
    if (row_tiles == 2) {
      _tile_loadd(5, a + tiles * tile_floats, line);
      _tile_dpbf16ps(1, 5, 6);
    }
  };
  for (std::int64_t c = 0; c < chunks; ++c) {
    // The codes of the chunk after the next one; behind the last, those of the next pair of tiles.
    const std::int64_t ahead =
        c + chunks_ahead < chunks
            ? chunks_ahead * chunk_bytes
            : 16 * row_tiles * w.k / 2 - (chunks - chunks_ahead) * chunk_bytes;
    // A quarter of the rows, then a quarter of the products of the chunk before: near enough for
    // the processor to run them at the same time.
    constexpr int rows = 4 * row_tiles;
#pragma GCC unroll 4
    for (std::int64_t s = 0; s < tiles; ++s) {
      const std::int64_t row = s * rows, j = 16 * tile + row;
      Engine::template decode_rows<rows>(
          {.codes = w.codes + j * w.k / 2 + c * chunk_bytes,
           .scales = scales + j * half_chunks_of(w) + 2 * c,
           .codes_stride = w.k / 2,
           .scales_stride = half_chunks_of(w),
           .rows = least(rows, w.n - j),
           .is_whole = (c + 1) * chunk_weights <= w.k,
           .ahead = ahead},
          decoded[c % 2] + row / 16 * tiles * tile_floats + row % 16 * 16);
      if (c > 0) multiply(c - 1, s);
    }
  }
  for (std::int64_t s = 0; s < tiles; ++s) multiply(chunks - 1, s);
  _tile_stored(0, sums, line);
  if (row_tiles == 2) _tile_stored(1, sums + tile_floats, line);
}

/// Row tiles [begin, end) of W with all of m <= 16 tokens.
template <typename Engine>
void forward_rows_of_sixteen(const NF4Bytes& w, const float* scales, const float* packed,
                             const BFloat16* bias, BFloat16* y, std::int64_t m, std::int64_t begin,
                             std::int64_t end) {
  alignas(64) float sums[2 * avx512::tile_floats];
  for (std::int64_t tile = begin; tile < end; tile += 2) {
    const std::int64_t pair = least(2, end - tile);
    const auto forward = pair == 2 ? forward_pair<Engine, 2> : forward_pair<Engine, 1>;
    forward(w, scales, packed, tile, sums);
    for (std::int64_t r = 0; r < pair; ++r) {
      avx512::store_outputs<Engine>(sums + r * avx512::tile_floats, bias, y, m, w.n,
                                    16 * (tile + r));
    }
  }
}

}  // namespace
}  // namespace qlora::amx
