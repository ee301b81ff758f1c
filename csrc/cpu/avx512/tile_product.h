// The two products with an NF4 weight, tile by tile, over an engine that knows how tiles are packed,
// decoded and multiplied:
//
//   forward      yᵀ[n, m] = W[n, k] · xᵀ[k, m]     W decoded into row tiles, x packed into columns
//   grad_input   dx[m, k] = dy[m, n] · W[n, k]     dy packed into row tiles, W decoded into columns
//
// Both read the same codes. Activations are packed once a call by all threads; each thread then
// decodes a panel of its part of W that fits into its L2 cache and multiplies it with all tokens.
#pragma once

#include "cpu/avx512/nf4_decode.h"
#include "cpu/avx512/tile_layout.h"
#include "cpu/avx512/transpose.h"
#include "cpu/thread_pool.h"
#include "cpu/workspace.h"

namespace qlora::avx512 {
namespace {

// Tokens that are packed and worked on together: bounds the workspaces.
constexpr std::int64_t tokens_per_pass = 512;
// Inner tiles of a panel: with two tiles of the other operand, 32 KB of a 48 KB (or 32 KB) L1.
constexpr std::int64_t panel_inner_tiles = 16;
// Tiles of W in a panel, at most: 16 of 16 inner tiles are 256 KB of L2, and their sums with 512
// tokens as much again.
constexpr std::int64_t panel_tiles = 16;

inline float* float_workspace(Workspace purpose, std::int64_t count) {
  return static_cast<float*>(
      thread_workspace(purpose, static_cast<std::size_t>(count) * sizeof(float)));
}

constexpr std::int64_t least(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

/// sums of all pairs of tiles: `weight_tiles` of W (rows or columns) with `token_tiles`.
template <typename Engine, bool weight_is_rows>
void multiply_panel(const float* panel, const float* packed, std::int64_t packed_stride,
                    std::int64_t weight_tiles, std::int64_t token_tiles, std::int64_t token_count,
                    std::int64_t inner_tiles, bool is_first, float* sums) {
  const std::int64_t panel_stride = panel_inner_tiles * tile_floats;
  const std::int64_t sums_stride =
      (weight_is_rows ? token_tiles : weight_tiles) * tile_floats;  // of a row tile
  for (std::int64_t t = 0; t < token_tiles; t += 2) {
    for (std::int64_t w = 0; w < weight_tiles; w += 2) {
      const std::int64_t row = weight_is_rows ? w : t, column = weight_is_rows ? t : w;
      const float* const weights = panel + w * panel_stride;
      const float* const tokens = packed + t * packed_stride;
      const std::int64_t weight_pair = least(2, weight_tiles - w);
      const std::int64_t token_pair = least(2, token_tiles - t);
      Engine::multiply({
          .a = weight_is_rows ? weights : tokens,
          .b = weight_is_rows ? tokens : weights,
          .sums = sums + row * sums_stride + column * tile_floats,
          .a_stride = weight_is_rows ? panel_stride : packed_stride,
          .b_stride = weight_is_rows ? packed_stride : panel_stride,
          .sums_row_stride = sums_stride,
          .row_tiles = weight_is_rows ? weight_pair : token_pair,
          .column_tiles = weight_is_rows ? token_pair : weight_pair,
          .inner_tiles = inner_tiles,
          .row_count = weight_is_rows ? 16 * weight_pair : token_count - 16 * t,
          .is_first = is_first,
      });
    }
  }
}

// ---- forward

/// Tiles of rows [begin, end) of W, with all packed tokens.
template <typename Engine>
void forward_rows(const NF4Bytes& w, const float* packed, const typename Engine::Activation* bias,
                  typename Engine::Activation* y, std::int64_t m, std::int64_t begin,
                  std::int64_t end) {
  using Simd = typename Engine::Simd;
  constexpr std::int64_t chunk_tiles = Engine::tiles_per_inner_chunk;
  const std::int64_t token_tiles = ceil_divide(m, 16), chunks = ceil_divide(w.k, chunk_weights);
  const std::int64_t inner_tiles = chunks * chunk_tiles;
  // Few tokens use a panel once: it had better stay in L1.
  const std::int64_t tiles_at_once = token_tiles <= 2 ? 2 : panel_tiles;
  float* const panel =
      float_workspace(Workspace::weight_panel, tiles_at_once * panel_inner_tiles * tile_floats);
  float* const sums = float_workspace(Workspace::sums, tiles_at_once * token_tiles * tile_floats);
  // Two scales a chunk, also where a block is longer.
  float* const scales = float_workspace(Workspace::scales, 16 * tiles_at_once * w.k / 64 + 16);

  for (std::int64_t tile = begin; tile < end; tile += tiles_at_once) {
    const std::int64_t tiles = least(tiles_at_once, end - tile);
    const std::int64_t first_row = 16 * tile, rows = least(16 * tiles, w.n - first_row);
    const std::int64_t first_block = first_row * w.k / w.block_size;
    decode_scales(w, first_block, ceil_divide((first_row + rows) * w.k, w.block_size) - first_block,
                  scales);
    const int block_shift = __builtin_ctzll(static_cast<unsigned long long>(w.block_size));

    for (std::int64_t inner = 0; inner < inner_tiles; inner += panel_inner_tiles) {
      const std::int64_t inner_end = least(inner + panel_inner_tiles, inner_tiles);
      for (std::int64_t row = 0; row < 16 * tiles; ++row) {
        float* const row_tiles = panel + row / 16 * panel_inner_tiles * tile_floats;
        for (std::int64_t i = inner; i < inner_end; i += chunk_tiles) {
          float* const tile_of_row = row_tiles + (i - inner) * tile_floats;
          if (row >= rows) {
            for (std::int64_t s = 0; s < chunk_tiles; ++s) {
              _mm512_store_ps(tile_of_row + s * tile_floats + row % 16 * 16, _mm512_setzero_ps());
            }
            continue;
          }
          const std::int64_t column = i / chunk_tiles * chunk_weights;
          const std::int64_t e = (first_row + row) * w.k + column;
          const bool is_whole = column + chunk_weights <= w.k;
          const float* const scale = scales - first_block;
          const float scale0 = scale[e >> block_shift];
          const float scale1 = is_whole ? scale[(e + half_chunk_weights) >> block_shift] : 0.0f;
          Engine::decode_row(w.codes + e / 2, is_whole, scale0, scale1, tile_of_row, row % 16);
        }
      }
      multiply_panel<Engine, true>(panel, packed + inner * tile_floats, inner_tiles * tile_floats,
                                   tiles, token_tiles, m, inner_end - inner, inner == 0, sums);
    }

    for (std::int64_t t = 0; t < token_tiles; ++t) {
      for (std::int64_t r = 0; r < tiles; ++r) {
        __m512i tokens[16];
        const float* const tile_sums = sums + (r * token_tiles + t) * tile_floats;
        for (int i = 0; i < 16; ++i) tokens[i] = _mm512_load_si512(tile_sums + 16 * i);
        transpose16(tokens);
        const std::int64_t j = first_row + 16 * r, width = least(16, w.n - j);
        const auto biases = bias ? Simd::load_partial(bias + j, width) : Simd::zero();
        for (std::int64_t i = 0; i < least(16, m - 16 * t); ++i) {
          Simd::store_partial(y + (16 * t + i) * w.n + j,
                              typename Simd::Floats{_mm512_castsi512_ps(tokens[i])} + biases,
                              width);
        }
      }
    }
  }
}

/// y[m, n] = x[m, k] · Wᵀ + bias, of a weight that is_chunked.
template <typename Engine>
void forward(const typename Engine::Activation* x, const NF4Bytes& w,
             const typename Engine::Activation* bias, typename Engine::Activation* y,
             std::int64_t m_total, int num_threads) {
  const std::int64_t chunks = ceil_divide(w.k, chunk_weights);
  const std::int64_t chunk_floats = Engine::tiles_per_inner_chunk * tile_floats;
  for (std::int64_t first = 0; first < m_total; first += tokens_per_pass) {
    const std::int64_t m = least(tokens_per_pass, m_total - first);
    const std::int64_t token_tiles = ceil_divide(m, 16);
    float* const packed =
        float_workspace(Workspace::packed_activations, token_tiles * chunks * chunk_floats);
    const auto* const x_pass = x + first * w.k;
    parallel_for(num_threads, token_tiles * chunks, 8, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) {
        const std::int64_t tile = i / chunks, column = i % chunks * chunk_weights;
        Engine::pack_columns(x_pass + 16 * tile * w.k + column, w.k, m - 16 * tile, w.k - column,
                             packed + i * chunk_floats);
      }
    });
    parallel_for(num_threads, ceil_divide(w.n, 16), 2, [&](std::int64_t begin, std::int64_t end) {
      Engine::begin();
      forward_rows<Engine>(w, packed, bias, y + first * w.n, m, begin, end);
      Engine::end();
    });
  }
}

// ---- gradient of the input

/// Chunks of columns [begin, end) of dx, of all packed tokens.
template <typename Engine>
void grad_input_columns(const NF4Bytes& w, const float* packed, typename Engine::Activation* dx,
                        std::int64_t m, std::int64_t begin, std::int64_t end) {
  using Simd = typename Engine::Simd;
  constexpr std::int64_t chunk_tiles = Engine::tiles_per_column_chunk;
  constexpr std::int64_t panel_rows = panel_inner_tiles * Engine::inner_per_tile;
  constexpr std::int64_t chunks_at_once = panel_tiles / chunk_tiles;
  const std::int64_t token_tiles = ceil_divide(m, 16);
  const std::int64_t inner_tiles = ceil_divide(w.n, Engine::inner_per_tile);
  constexpr std::int64_t panel_stride = panel_inner_tiles * tile_floats;
  float* const panel = float_workspace(Workspace::weight_panel, panel_tiles * panel_stride);
  float* const sums = float_workspace(Workspace::sums, panel_tiles * token_tiles * tile_floats);
  const int block_shift = __builtin_ctzll(static_cast<unsigned long long>(w.block_size));

  for (std::int64_t chunk = begin; chunk < end; chunk += chunks_at_once) {
    const std::int64_t chunk_count = least(chunks_at_once, end - chunk);
    for (std::int64_t inner = 0; inner < inner_tiles; inner += panel_inner_tiles) {
      const std::int64_t first_row = inner * Engine::inner_per_tile;
      const std::int64_t panel_tile_count = least(panel_inner_tiles, inner_tiles - inner);
      const std::int64_t rows = least(panel_rows, panel_tile_count * Engine::inner_per_tile);
      for (std::int64_t row = 0; row < rows; row += Engine::rows_per_decode) {
        float scales[Engine::rows_per_decode][2 * chunks_at_once + 16];
        std::int64_t first_block[Engine::rows_per_decode];
        for (std::int64_t r = 0; r < Engine::rows_per_decode; ++r) {
          const std::int64_t j = first_row + row + r;
          if (j >= w.n) continue;
          const std::int64_t e = j * w.k + chunk * chunk_weights;
          const std::int64_t last = j * w.k + least((chunk + chunk_count) * chunk_weights, w.k) - 1;
          first_block[r] = e >> block_shift;
          decode_scales(w, first_block[r], (last >> block_shift) - first_block[r] + 1, scales[r]);
        }
        for (std::int64_t c = 0; c < chunk_count; ++c) {
          const std::int64_t column = (chunk + c) * chunk_weights;
          const bool is_whole = column + chunk_weights <= w.k;
          static constexpr std::uint8_t no_codes[64] = {};
          const std::uint8_t* codes[Engine::rows_per_decode];
          float pair[Engine::rows_per_decode][2];
          for (std::int64_t r = 0; r < Engine::rows_per_decode; ++r) {
            const std::int64_t j = first_row + row + r, e = j * w.k + column;
            const bool is_there = j < w.n;  // a row that is not has scale 0
            codes[r] = is_there ? w.codes + e / 2 : no_codes;
            pair[r][0] = is_there ? scales[r][(e >> block_shift) - first_block[r]] : 0.0f;
            pair[r][1] = is_there && is_whole
                             ? scales[r][((e + half_chunk_weights) >> block_shift) - first_block[r]]
                             : 0.0f;
          }
          const std::int64_t dword = row / Engine::rows_per_decode;
          Engine::decode_columns(codes, is_whole, pair,
                                 panel + c * chunk_tiles * panel_stride + dword / 16 * tile_floats,
                                 panel_stride, dword % 16);
        }
      }
      multiply_panel<Engine, false>(panel, packed + inner * tile_floats, inner_tiles * tile_floats,
                                    chunk_count * chunk_tiles, token_tiles, m, panel_tile_count,
                                    inner == 0, sums);
    }

    for (std::int64_t token = 0; token < m; ++token) {
      for (std::int64_t c = 0; c < chunk_count; ++c) {
        const float* tiles[chunk_tiles];
        for (std::int64_t s = 0; s < chunk_tiles; ++s) {
          tiles[s] = sums + ((token / 16 * chunk_count + c) * chunk_tiles + s) * tile_floats;
        }
        __m512 columns[chunk_weights / 16];
        Engine::order_columns(tiles, token % 16, columns);
        const std::int64_t column = (chunk + c) * chunk_weights;
        for (std::int64_t i = 0; i < least(chunk_weights, w.k - column) / 16; ++i) {
          Simd::store(dx + token * w.k + column + 16 * i, {columns[i]});
        }
      }
    }
  }
}

/// dx[m, k] = dy[m, n] · W, of a weight that is_chunked.
template <typename Engine>
void grad_input(const typename Engine::Activation* dy, const NF4Bytes& w,
                typename Engine::Activation* dx, std::int64_t m_total, int num_threads) {
  const std::int64_t inner_tiles = ceil_divide(w.n, Engine::inner_per_tile);
  for (std::int64_t first = 0; first < m_total; first += tokens_per_pass) {
    const std::int64_t m = least(tokens_per_pass, m_total - first);
    const std::int64_t token_tiles = ceil_divide(m, 16);
    float* const packed =
        float_workspace(Workspace::packed_activations, token_tiles * inner_tiles * tile_floats);
    const auto* const dy_pass = dy + first * w.n;
    parallel_for(num_threads, token_tiles * inner_tiles, 32,
                 [&](std::int64_t begin, std::int64_t end) {
                   for (std::int64_t i = begin; i < end; ++i) {
                     const std::int64_t tile = i / inner_tiles;
                     const std::int64_t j = i % inner_tiles * Engine::inner_per_tile;
                     Engine::pack_rows(dy_pass + 16 * tile * w.n + j, w.n, m - 16 * tile, w.n - j,
                                       packed + i * tile_floats);
                   }
                 });
    parallel_for(num_threads, ceil_divide(w.k, chunk_weights), 1,
                 [&](std::int64_t begin, std::int64_t end) {
                   Engine::begin();
                   grad_input_columns<Engine>(w, packed, dx + first * w.k, m, begin, end);
                   Engine::end();
                 });
  }
}

}  // namespace
}  // namespace qlora::avx512
