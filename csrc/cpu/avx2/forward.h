// y[m, n] = x[m, k] · Wᵀ as yᵀ = W · xᵀ: W is decoded into row tiles, x packed into column tiles.
//
// Within half a chunk of 64, inner element 8 c + d of a tile is column 8 d + c: plane c, lane d.
#pragma once

#include "cpu/avx2/micro_kernel.h"
#include "cpu/avx2/nf4_decode.h"
#include "cpu/avx2/transpose.h"

namespace qlora::avx2 {
namespace {

// Tokens that are packed and worked on together: bounds the workspaces.
constexpr std::int64_t tokens_per_pass = 512;
// Row tiles of W that are decoded together: 96 KB of an L2 of 256 KB and up. Token tiles pass
// through L1 once for all of them.
constexpr std::int64_t most_row_tiles = 16;

// A column tile of a slab.
constexpr std::int64_t column_tile_floats = slab_depth * tile_columns;

/// Asks for `count` floats. Into L2: L1 holds what is being multiplied.
QLORA_INLINE void prefetch_floats(const float* p, std::int64_t count) {
  constexpr std::int64_t line_floats = 16;
  for (std::int64_t i = 0; i < count; i += line_floats) {
    _mm_prefetch(reinterpret_cast<const char*>(p + i), _MM_HINT_T1);
  }
}

QLORA_INLINE void load_rows(const float* rows, std::int64_t stride, std::int64_t count,
                            __m256 (&out)[8]) {
  for (std::int64_t i = 0; i < 8; ++i) {
    out[i] = i < count ? _mm256_load_ps(rows + i * stride) : _mm256_setzero_ps();
  }
}

// The first `count` lanes, where count may exceed them.

template <typename T>
QLORA_INLINE Simd::Floats load_first(const T* p, std::int64_t count) {
  return count >= Simd::lanes ? Simd::load(p) : Simd::load_partial(p, count);
}
template <typename T>
QLORA_INLINE void store_first(T* p, Simd::Floats v, std::int64_t count) {
  count >= Simd::lanes ? Simd::store(p, v) : Simd::store_partial(p, v, count);
}

/// Half a chunk of up to 16 tokens as inner elements of a column tile.
template <typename T>
void pack_half_chunk(const T* x, std::int64_t stride, std::int64_t count, float* tile) {
  for (std::int64_t first = 0; first < tile_columns; first += 8) {
    for (std::int64_t d = 0; d < 8; ++d) {
      __m256 tokens[8];
      for (std::int64_t i = 0; i < 8; ++i) {
        tokens[i] = first + i < count ? Simd::load(x + (first + i) * stride + 8 * d).v
                                      : _mm256_setzero_ps();
      }
      transpose8(tokens);
      for (std::int64_t c = 0; c < 8; ++c) {
        _mm256_store_ps(tile + (8 * c + d) * tile_columns + first, tokens[c]);
      }
    }
  }
}

/// The part of x that is worked on at a time, as [slab][token tile][inner element][token].
template <typename T>
void pack_tokens(const T* x, std::int64_t m, std::int64_t k, float* packed, int num_threads) {
  const std::int64_t token_tiles = ceil_divide(m, tile_columns);
  const std::int64_t halves = k / half_chunk_weights;
  constexpr std::int64_t halves_per_slab = slab_depth / half_chunk_weights;
  parallel_for(num_threads, token_tiles * halves, grain_for(tile_columns * half_chunk_weights),
               [&](std::int64_t begin, std::int64_t end) {
                 for (std::int64_t i = begin; i < end; ++i) {
                   const std::int64_t tile = i / halves, half = i % halves;
                   const std::int64_t slab = half / halves_per_slab;
                   const std::int64_t depth = (slab * token_tiles + tile) * slab_depth +
                                              half % halves_per_slab * half_chunk_weights;
                   const std::int64_t first = tile * tile_columns;
                   pack_half_chunk(x + first * k + half * half_chunk_weights, k, m - first,
                                   packed + depth * tile_columns);
                 }
               });
}

/// Columns [column, column + depth) of `count` rows of W from `row` on, as row tiles. `ahead` is
/// the way to codes that will be wanted soon.
template <typename T>
void decode_rows(const NF4Bytes& w, const float* scales, std::int64_t row, std::int64_t count,
                 std::int64_t column, std::int64_t depth, std::int64_t ahead, float* panel) {
  const std::int64_t whole_tiles = ceil_divide(count, tile_rows) * tile_rows;
  for (std::int64_t i = 0; i < count; ++i) {
    const std::uint8_t* codes = w.codes + ((row + i) * w.k + column) / 2;
    const float* const row_scales =
        scales + (row + i) * half_chunks_of(w) + column / half_chunk_weights;
    float* const out = panel + i * slab_depth;
    // Tables are made half a chunk early, beside look-ups that do not wait for them. There is a
    // scale after the last one.
    auto next = make_decode_table<T>(row_scales[0]);
    for (std::int64_t d = 0; d < depth; d += half_chunk_weights) {
      prefetch_codes(codes + ahead);
      const auto table = next;
      next = make_decode_table<T>(row_scales[d / half_chunk_weights + 1]);
      const auto store = [=](int c, __m256 plane) __attribute__((always_inline)) {
        _mm256_store_ps(out + d + 8 * c, plane);
      };
      decode_half_chunk<T>(codes, table, store);
      codes += half_chunk_bytes;
    }
  }
  for (std::int64_t i = count; i < whole_tiles; ++i) {
    for (std::int64_t d = 0; d < depth; d += 8) {
      _mm256_store_ps(panel + i * slab_depth + d, _mm256_setzero_ps());
    }
  }
}

/// y of tokens [0, m) and `count` rows of W from sums [token tile][row][token of the tile].
template <typename T>
void write_rows(const float* sums, std::int64_t rows_per_token_tile, const T* bias, T* y,
                std::int64_t m, std::int64_t n, std::int64_t count) {
  for (std::int64_t first = 0; first < m; first += 8) {
    const float* const tile =
        sums + first / tile_columns * rows_per_token_tile * tile_columns + first % tile_columns;
    for (std::int64_t j = 0; j < count; j += 8) {
      const std::int64_t width = least(8, count - j);
      __m256 tokens[8];
      load_rows(tile + j * tile_columns, tile_columns, width, tokens);
      transpose8(tokens);
      const auto biases = bias ? load_first(bias + j, width) : Simd::zero();
      for (std::int64_t i = 0; i < least(8, m - first); ++i) {
        store_first(y + (first + i) * n + j, Simd::Floats{tokens[i]} + biases, width);
      }
    }
  }
}

/// Row tiles [begin, end) of W with all packed tokens. `scales` are those of every half chunk.
template <typename T>
void forward_rows(const NF4Bytes& w, const float* scales, const float* packed, const T* bias, T* y,
                  std::int64_t m, std::int64_t begin, std::int64_t end) {
  const std::int64_t token_tiles = ceil_divide(m, tile_columns);
  // Blocks of equal size.
  const std::int64_t tiles_at_once =
      ceil_divide(end - begin, ceil_divide(end - begin, most_row_tiles));
  const std::int64_t rows_at_once = tiles_at_once * tile_rows;
  float* const panel = float_workspace(Workspace::weight_panel, rows_at_once * slab_depth);
  float* const sums = float_workspace(Workspace::sums, token_tiles * rows_at_once * tile_columns);

  for (std::int64_t tile = begin; tile < end; tile += tiles_at_once) {
    const std::int64_t row = tile * tile_rows;
    const std::int64_t tiles = least(tiles_at_once, end - tile);
    const std::int64_t rows = least(tiles * tile_rows, w.n - row);
    for (std::int64_t column = 0; column < w.k; column += slab_depth) {
      const std::int64_t depth = least(slab_depth, w.k - column);
      const std::int64_t ahead =
          column + depth < w.k ? depth / 2 : (rows_at_once * w.k - column) / 2;
      decode_rows<T>(w, scales, row, rows, column, depth, ahead, panel);
      const std::int64_t share = column_tile_floats / tiles;
      for (std::int64_t t = 0; t < token_tiles; ++t) {
        const float* const columns =
            packed + (column * token_tiles + t * slab_depth) * tile_columns;
        for (std::int64_t r = 0; r < tiles; ++r) {
          // Row tiles share in asking for the tile after this one, which comes from L3 or further.
          prefetch_floats(columns + column_tile_floats + r * share, share);
          multiply({.rows = panel + r * tile_rows * slab_depth,
                    .columns = columns,
                    .sums = sums + (t * rows_at_once + r * tile_rows) * tile_columns,
                    .row_count = tile_rows,
                    .depth = depth,
                    .is_narrow = m - t * tile_columns <= 8,
                    .is_first = column == 0});
        }
      }
    }
    write_rows(sums, rows_at_once, bias ? bias + row : nullptr, y + row, m, w.n, rows);
  }
}

template <typename T>
void forward(const T* x, const NF4Bytes& w, const T* bias, T* y, std::int64_t m_total,
             int num_threads) {
  const float* const scales = decode_all_scales<Simd>(w, num_threads);
  const std::int64_t slabs = ceil_divide(w.k, slab_depth);
  for (std::int64_t first = 0; first < m_total; first += tokens_per_pass) {
    const std::int64_t m = least(tokens_per_pass, m_total - first);
    const std::int64_t token_tiles = ceil_divide(m, tile_columns);
    float* const packed = float_workspace(Workspace::packed_activations,
                                          slabs * token_tiles * slab_depth * tile_columns);
    pack_tokens(x + first * w.k, m, w.k, packed, num_threads);
    parallel_for(num_threads, ceil_divide(w.n, tile_rows), 4,
                 [&](std::int64_t begin, std::int64_t end) {
                   forward_rows(w, scales, packed, bias, y + first * w.n, m, begin, end);
                 });
  }
}

}  // namespace
}  // namespace qlora::avx2
