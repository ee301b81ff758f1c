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
// Inner tiles of a panel of W. Two tiles of it and two of the tokens' are in use at a time: 32 KB of
// an L1 of 32 to 48 KB.
constexpr std::int64_t panel_inner_tiles = 8;
// Row tiles whose sums are worked on together, so that the tokens' share of a panel stays in L2: the
// sums of 256 rows and 512 tokens are 512 KB.
constexpr std::int64_t row_tiles_at_once = 16;

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

/// The scale of every half chunk of row `j`, two to a chunk.
inline void decode_row_scales(const NF4Bytes& w, std::int64_t j, std::int64_t half_chunks,
                              float* out) {
  const std::int64_t first = j * w.k / w.block_size;
  if (w.block_size == half_chunk_weights) return decode_scales(w, first, half_chunks, out);
  for (std::int64_t h = 0; h < half_chunks; ++h) {
    const std::int64_t block = (j * w.k + h * half_chunk_weights) / w.block_size;
    if (h > 0 && block == (j * w.k + (h - 1) * half_chunk_weights) / w.block_size) {
      out[h] = out[h - 1];
    } else {
      decode_scales(w, block, 1, out + h);
    }
  }
}

/// Row `j` of W, inner tiles [begin, end) of it, as row `row` of a row tile. A row that W does not
/// have is zeros.
template <typename Engine>
QLORA_INLINE void decode_panel_row(const NF4Bytes& w, std::int64_t j, const float* scales,
                                   std::int64_t begin, std::int64_t end,
                                   std::int64_t prefetch_bytes, float* tiles, std::int64_t row) {
  constexpr std::int64_t chunk_tiles = Engine::tiles_per_inner_chunk;
  const std::int64_t whole_chunks = w.k / chunk_weights;
  const std::uint8_t* const codes = w.codes + j * w.k / 2;
  for (std::int64_t i = begin; i < end; i += chunk_tiles, tiles += chunk_tiles * tile_floats) {
    const std::int64_t chunk = i / chunk_tiles;
    const std::uint8_t* const chunk_codes = codes + chunk * (chunk_weights / 2);
    _mm_prefetch(reinterpret_cast<const char*>(chunk_codes + prefetch_bytes), _MM_HINT_T0);
    Engine::decode_row(chunk_codes, chunk < whole_chunks, scales[2 * chunk], scales[2 * chunk + 1],
                       tiles, row);
  }
}

/// Row tiles [begin, end) of W with all packed tokens.
template <typename Engine>
void forward_rows(const NF4Bytes& w, const float* packed, const typename Engine::Activation* bias,
                  typename Engine::Activation* y, std::int64_t m, std::int64_t begin,
                  std::int64_t end) {
  using Simd = typename Engine::Simd;
  const std::int64_t token_tiles = ceil_divide(m, 16);
  const std::int64_t inner_tiles = ceil_divide(w.k, chunk_weights) * Engine::tiles_per_inner_chunk;
  const std::int64_t half_chunks = w.k / half_chunk_weights;
  const std::int64_t scales_per_row = half_chunks + 1;  // an odd number of halves is read as even
  constexpr std::int64_t panel_stride = panel_inner_tiles * tile_floats;
  float* const panel = float_workspace(Workspace::weight_panel, 2 * panel_stride);
  float* const sums =
      float_workspace(Workspace::sums, row_tiles_at_once * token_tiles * tile_floats);
  float* const scales = float_workspace(Workspace::scales, 16 * row_tiles_at_once * scales_per_row);

  for (std::int64_t tile = begin; tile < end; tile += row_tiles_at_once) {
    const std::int64_t tiles = least(row_tiles_at_once, end - tile);
    const std::int64_t first_row = 16 * tile, rows = least(16 * tiles, w.n - first_row);
    for (std::int64_t row = 0; row < rows; ++row) {
      float* const row_scales = scales + row * scales_per_row;
      decode_row_scales(w, first_row + row, half_chunks, row_scales);
      row_scales[half_chunks] = 0.0f;
    }

    for (std::int64_t inner = 0; inner < inner_tiles; inner += panel_inner_tiles) {
      const std::int64_t inner_count = least(panel_inner_tiles, inner_tiles - inner);
      for (std::int64_t r = 0; r < tiles; r += 2) {
        const std::int64_t pair = least(2, tiles - r);
        for (std::int64_t i = 0; i < 16 * pair; ++i) {
          const std::int64_t row = 16 * r + i;
          float* const row_tile = panel + i / 16 * panel_stride;
          if (row < rows) {
            // What the next pair of tiles will read.
            const std::int64_t prefetch_bytes = 32 * w.k / 2;
            decode_panel_row<Engine>(w, first_row + row, scales + row * scales_per_row, inner,
                                     inner + inner_count, prefetch_bytes, row_tile, i % 16);
          } else {
            for (std::int64_t t = 0; t < inner_count; ++t) {
              _mm512_store_ps(row_tile + t * tile_floats + i % 16 * 16, _mm512_setzero_ps());
            }
          }
        }
        multiply_panel<Engine, true>(panel, packed + inner * tile_floats, inner_tiles * tile_floats,
                                     pair, token_tiles, m, inner_count, inner == 0,
                                     sums + r * token_tiles * tile_floats);
      }
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

// A panel reads one or two cache lines of each row: too little for the processor's own prefetchers.
constexpr std::int64_t rows_ahead = 32;

/// The scales of the two halves of the chunk that begins at element `e`.
QLORA_INLINE void decode_chunk_scales(const NF4Bytes& w, std::int64_t e, bool is_whole,
                                      float (&scales)[2]) {
  const int shift = __builtin_ctzll(static_cast<unsigned long long>(w.block_size));
  const std::int64_t block0 = e >> shift, block1 = (e + half_chunk_weights) >> shift;
  scales[0] = decode_scale(w, block0);
  if (is_whole) scales[1] = block1 == block0 ? scales[0] : decode_scale(w, block1);
}

/// Chunks of columns [begin, end) of dx, of all packed tokens.
template <typename Engine>
void grad_input_columns(const NF4Bytes& w, const float* packed, typename Engine::Activation* dx,
                        std::int64_t m, std::int64_t begin, std::int64_t end) {
  using Simd = typename Engine::Simd;
  constexpr std::int64_t chunk_tiles = Engine::tiles_per_column_chunk;
  constexpr std::int64_t step = Engine::rows_per_decode;
  constexpr std::int64_t panel_stride = panel_inner_tiles * tile_floats;
  const std::int64_t token_tiles = ceil_divide(m, 16);
  const std::int64_t inner_tiles = ceil_divide(w.n, Engine::inner_per_tile);
  float* const panel = float_workspace(Workspace::weight_panel, chunk_tiles * panel_stride);
  float* const sums = float_workspace(Workspace::sums, chunk_tiles * token_tiles * tile_floats);

  for (std::int64_t chunk = begin; chunk < end; ++chunk) {
    const std::int64_t column = chunk * chunk_weights;
    const bool is_whole = column + chunk_weights <= w.k;
    for (std::int64_t inner = 0; inner < inner_tiles; inner += panel_inner_tiles) {
      const std::int64_t inner_count = least(panel_inner_tiles, inner_tiles - inner);
      for (std::int64_t i = 0; i < inner_count * Engine::inner_per_tile; i += step) {
        const std::int64_t j = inner * Engine::inner_per_tile + i;
        const std::uint8_t* codes[step];
        float scales[step][2] = {};
        for (std::int64_t r = 0; r < step; ++r) {
          static constexpr std::uint8_t no_codes[chunk_weights / 2] = {};
          codes[r] = no_codes;  // a row that W does not have: scales of zero
          if (j + r >= w.n) continue;
          const std::int64_t e = (j + r) * w.k + column;
          codes[r] = w.codes + e / 2;
          _mm_prefetch(reinterpret_cast<const char*>(codes[r] + rows_ahead * w.k / 2), _MM_HINT_T0);
          decode_chunk_scales(w, e, is_whole, scales[r]);
        }
        Engine::decode_columns(codes, is_whole, scales, panel + i / step / 16 * tile_floats,
                               panel_stride, i / step % 16);
      }
      multiply_panel<Engine, false>(panel, packed + inner * tile_floats, inner_tiles * tile_floats,
                                    chunk_tiles, token_tiles, m, inner_count, inner == 0, sums);
    }

    for (std::int64_t token = 0; token < m; ++token) {
      const float* tiles[chunk_tiles];
      for (std::int64_t s = 0; s < chunk_tiles; ++s) {
        tiles[s] = sums + (token / 16 * chunk_tiles + s) * tile_floats;
      }
      __m512 columns[chunk_weights / 16];
      Engine::order_columns(tiles, token % 16, columns);
      for (std::int64_t i = 0; i < least(chunk_weights, w.k - column) / 16; ++i) {
        Simd::store(dx + token * w.k + column + 16 * i, {columns[i]});
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
