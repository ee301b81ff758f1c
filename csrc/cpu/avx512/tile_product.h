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
#include "cpu/simd/nf4_chunks.h"

namespace qlora::avx512 {
namespace {

// Tokens that are packed and worked on together: bounds the workspaces.
constexpr std::int64_t tokens_per_pass = 512;
// Inner tiles of a panel of W. Two tiles of it and two of the tokens' are in use at a time: 32 KB of
// an L1 of 32 to 48 KB.
constexpr std::int64_t panel_inner_tiles = 8;
// Tiles of sums that are worked on together, while the tokens' share of a panel stays in L2: 512 KB.
constexpr std::int64_t sums_at_once = 512;

// Token tiles whose packed activations fit into L2 whole (512 KB at k = 4096): W is then better read
// row by row, once.
constexpr std::int64_t few_token_tiles = 4;

/// An engine's state in a thread: tile registers, where it has any.
template <typename Engine>
struct EngineScope {
  EngineScope() { Engine::begin(); }
  ~EngineScope() { Engine::end(); }
  EngineScope(const EngineScope&) = delete;
  EngineScope& operator=(const EngineScope&) = delete;
};

/// sums of all pairs of tiles: `weight_tiles` of W (rows or columns) with `token_tiles`.
template <typename Engine, bool weight_is_rows>
void multiply_panel(const float* panel, const float* packed, std::int64_t packed_stride,
                    std::int64_t weight_tiles, std::int64_t token_tiles, std::int64_t token_count,
                    std::int64_t inner_tiles, bool is_first, float* sums) {
  const std::int64_t panel_stride = panel_inner_tiles * tile_floats + 16;
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

/// The sums of one tile, 16 rows of W from row j on and up to 16 tokens, of which there are
/// `token_count`, as y[token, j + row].
template <typename Engine>
void store_outputs(const float* sums, const typename Engine::Activation* bias,
                   typename Engine::Activation* y, std::int64_t token_count, std::int64_t n,
                   std::int64_t j) {
  using Simd = typename Engine::Simd;
  __m512i tokens[16];
  for (int i = 0; i < 16; ++i) tokens[i] = _mm512_load_si512(sums + 16 * i);
  transpose16(tokens);
  const std::int64_t width = least(16, n - j);
  const auto biases = bias ? Simd::load_partial(bias + j, width) : Simd::zero();
  for (std::int64_t i = 0; i < least(16, token_count); ++i) {
    Simd::store_partial(y + i * n + j,
                        typename Simd::Floats{_mm512_castsi512_ps(tokens[i])} + biases, width);
  }
}

/// Row tiles [begin, end) of W with all packed tokens. `scales` are those of every half chunk.
template <typename Engine>
void forward_rows(const NF4Bytes& w, const float* scales, const float* packed,
                  const typename Engine::Activation* bias, typename Engine::Activation* y,
                  std::int64_t m, std::int64_t begin, std::int64_t end) {
  constexpr std::int64_t chunk_tiles = Engine::tiles_per_inner_chunk;
  constexpr std::int64_t panel_stride = panel_inner_tiles * tile_floats + 16;
  const std::int64_t token_tiles = ceil_divide(m, 16);
  const std::int64_t inner_tiles = ceil_divide(w.k, chunk_weights) * chunk_tiles;
  const std::int64_t tile_bytes = 16 * w.k / 2;  // the codes of a tile's rows
  const std::int64_t tiles_at_once =
      token_tiles <= few_token_tiles ? 2 : sums_at_once / token_tiles;
  float* const panel = float_workspace(Workspace::weight_panel, 2 * panel_stride);
  float* const sums = float_workspace(Workspace::sums, tiles_at_once * token_tiles * tile_floats);

  for (std::int64_t tile = begin; tile < end; tile += tiles_at_once) {
    const std::int64_t tiles = least(tiles_at_once, end - tile), first_row = 16 * tile;
    for (std::int64_t inner = 0; inner < inner_tiles; inner += panel_inner_tiles) {
      const std::int64_t inner_count = least(panel_inner_tiles, inner_tiles - inner);
      for (std::int64_t r = 0; r < tiles; r += 2) {
        const std::int64_t pair = least(2, tiles - r);
        // From this panel's codes to those of the next one.
        const std::int64_t inner_bytes = inner / chunk_tiles * chunk_weights / 2;
        const std::int64_t ahead =
            r + 2 < tiles ? 2 * tile_bytes
            : inner + inner_count < inner_tiles
                ? inner_count / chunk_tiles * chunk_weights / 2 - r * tile_bytes
                : 2 * tile_bytes - inner_bytes;
        for (std::int64_t p = 0; p < pair; ++p) {
          const std::int64_t j = first_row + 16 * (r + p);
          for (std::int64_t i = 0; i < inner_count; i += chunk_tiles) {
            const std::int64_t chunk = (inner + i) / chunk_tiles;
            Engine::decode_rows({.codes = w.codes + (j * w.k + chunk * chunk_weights) / 2,
                                 .scales = scales + j * half_chunks_of(w) + 2 * chunk,
                                 .codes_stride = w.k / 2,
                                 .scales_stride = half_chunks_of(w),
                                 .rows = least(16, w.n - j),
                                 .is_whole = (chunk + 1) * chunk_weights <= w.k,
                                 .ahead = ahead},
                                panel + p * panel_stride + i * tile_floats);
          }
        }
        multiply_panel<Engine, true>(panel, packed + inner * tile_floats, inner_tiles * tile_floats,
                                     pair, token_tiles, m, inner_count, inner == 0,
                                     sums + r * token_tiles * tile_floats);
      }
    }

    for (std::int64_t t = 0; t < token_tiles; ++t) {
      for (std::int64_t r = 0; r < tiles; ++r) {
        store_outputs<Engine>(sums + (r * token_tiles + t) * tile_floats, bias, y + 16 * t * w.n,
                              m - 16 * t, w.n, first_row + 16 * r);
      }
    }
  }
}

/// y[m, n] = x[m, k] · Wᵀ + bias, of a weight that is_chunked. `rows_kernel` is forward_rows or does
/// the same.
template <typename Engine, auto rows_kernel = forward_rows<Engine>>
void forward(const typename Engine::Activation* x, const NF4Bytes& w,
             const typename Engine::Activation* bias, typename Engine::Activation* y,
             std::int64_t m_total, int num_threads) {
  const float* const scales = decode_all_scales<typename Engine::Simd>(w, num_threads);
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
      const EngineScope<Engine> scope;
      rows_kernel(w, scales, packed, bias, y + first * w.n, m, begin, end);
    });
  }
}

// ---- gradient of the input

/// Chunks of columns [begin, end) of dx, of all packed tokens.
template <typename Engine>
void grad_input_columns(const NF4Bytes& w, const float* scales, const float* packed,
                        typename Engine::Activation* dx, std::int64_t m, std::int64_t begin,
                        std::int64_t end) {
  using Simd = typename Engine::Simd;
  constexpr std::int64_t chunk_tiles = Engine::tiles_per_column_chunk;
  constexpr std::int64_t panel_stride = panel_inner_tiles * tile_floats + 16;
  const std::int64_t token_tiles = ceil_divide(m, 16);
  const std::int64_t inner_tiles = ceil_divide(w.n, Engine::inner_per_tile);
  const std::int64_t tile_bytes = Engine::inner_per_tile * w.k / 2;  // the codes of a tile's rows
  constexpr std::int64_t chunk_bytes = chunk_weights / 2;
  const std::int64_t fitting = sums_at_once / (chunk_tiles * token_tiles);
  const std::int64_t chunks_at_once = fitting < 1 ? 1 : least(fitting, 16);
  float* const panel = float_workspace(Workspace::weight_panel, chunk_tiles * panel_stride);
  float* const sums =
      float_workspace(Workspace::sums, chunks_at_once * chunk_tiles * token_tiles * tile_floats);

  for (std::int64_t chunk = begin; chunk < end; chunk += chunks_at_once) {
    const std::int64_t chunks = least(chunks_at_once, end - chunk);
    const std::int64_t sums_of_chunk = chunk_tiles * token_tiles * tile_floats;
    for (std::int64_t inner = 0; inner < inner_tiles; inner += panel_inner_tiles) {
      const std::int64_t inner_count = least(panel_inner_tiles, inner_tiles - inner);
      for (std::int64_t c = 0; c < chunks; ++c) {
        const std::int64_t column = (chunk + c) * chunk_weights;
        for (std::int64_t i = 0; i < inner_count; ++i) {
          const std::int64_t j = (inner + i) * Engine::inner_per_tile;
          Engine::decode_columns(
              {.codes = w.codes + (j * w.k + column) / 2,
               .scales = scales + j * half_chunks_of(w) + 2 * (chunk + c),
               .codes_stride = w.k / 2,
               .scales_stride = half_chunks_of(w),
               .rows = least(Engine::inner_per_tile, w.n - j),
               .is_whole = column + chunk_weights <= w.k,
               .ahead = c + 1 < chunks ? chunk_bytes
                                       : inner_count * tile_bytes - (chunks - 1) * chunk_bytes},
              panel + i * tile_floats, panel_stride);
        }
        multiply_panel<Engine, false>(panel, packed + inner * tile_floats,
                                      inner_tiles * tile_floats, chunk_tiles, token_tiles, m,
                                      inner_count, inner == 0, sums + c * sums_of_chunk);
      }
    }

    for (std::int64_t token = 0; token < m; ++token) {
      for (std::int64_t c = 0; c < chunks; ++c) {
        const float* tiles[chunk_tiles];
        for (std::int64_t s = 0; s < chunk_tiles; ++s) {
          tiles[s] = sums + c * sums_of_chunk + (token / 16 * chunk_tiles + s) * tile_floats;
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
  const float* const scales = decode_all_scales<typename Engine::Simd>(w, num_threads);
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
                   const EngineScope<Engine> scope;
                   grad_input_columns<Engine>(w, scales, packed, dx + first * w.k, m, begin, end);
                 });
  }
}

}  // namespace
}  // namespace qlora::avx512
