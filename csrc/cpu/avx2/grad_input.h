// dx[m, k] = dy[m, n] · W: dy is copied into row tiles, W decoded into column tiles, a chunk of 128
// columns (a cache line of codes) at a time. The columns of 8 vectors in column tiles are planes of
// half a chunk: lane d of plane c is column 8 d + c.
#pragma once

#include "cpu/avx2/forward.h"

namespace qlora::avx2 {
namespace {

constexpr std::int64_t tiles_per_half_chunk = half_chunk_weights / tile_columns;
// From column tile to column tile of a panel: no multiple of 4 KB, which would be one set of L1.
constexpr std::int64_t column_tile_stride = column_tile_floats + 16;

/// dy in fp32 as [slab][token][inner element].
template <typename T>
void pack_gradients(const T* dy, std::int64_t m, std::int64_t n, float* packed, int num_threads) {
  parallel_for(num_threads, ceil_divide(n, slab_depth) * m, grain_for(slab_depth),
               [&](std::int64_t begin, std::int64_t end) {
                 for (std::int64_t i = begin; i < end; ++i) {
                   const std::int64_t first = i / m * slab_depth;
                   const T* const row = dy + i % m * n + first;
                   const std::int64_t depth = least(slab_depth, n - first);
                   for (std::int64_t j = 0; j < depth; j += 8) {
                     Simd::store(packed + i * slab_depth + j, load_first(row + j, depth - j));
                   }
                 }
               });
}

/// `halves` halves of chunks, from column `column` on, of `count` rows of W as column tiles.
template <typename T>
void decode_columns(const NF4Bytes& w, const float* scales, std::int64_t row, std::int64_t count,
                    std::int64_t column, std::int64_t halves, std::int64_t ahead, float* panel) {
  const std::uint8_t* codes = w.codes + (row * w.k + column) / 2;
  const float* row_scales = scales + row * half_chunks_of(w) + column / half_chunk_weights;
  // Made half a chunk early, as in decode_rows.
  auto next = make_decode_table<T>(row_scales[0]);
  for (std::int64_t i = 0; i < count; ++i) {
    prefetch_codes(codes + ahead);
    const float* const next_scales = i + 1 < count ? row_scales + half_chunks_of(w) : row_scales;
    for (std::int64_t h = 0; h < halves; ++h) {
      float* const out = panel + h * tiles_per_half_chunk * column_tile_stride + i * tile_columns;
      const auto table = next;
      next = make_decode_table<T>(h + 1 < halves ? row_scales[h + 1] : next_scales[0]);
      const auto store = [=](int c, __m256 plane) __attribute__((always_inline)) {
        _mm256_store_ps(out + c / 2 * column_tile_stride + c % 2 * 8, plane);
      };
      decode_half_chunk<T>(codes + h * half_chunk_bytes, table, store);
    }
    codes += w.k / 2;
    row_scales = next_scales;
  }
}

/// Chunks of columns [begin, end) of dx, of all packed tokens.
template <typename T>
void grad_input_columns(const NF4Bytes& w, const float* scales, const float* packed, T* dx,
                        std::int64_t m, std::int64_t begin, std::int64_t end) {
  constexpr std::int64_t most_tiles = 2 * tiles_per_half_chunk;
  float* const panel = float_workspace(Workspace::weight_panel, most_tiles * column_tile_stride);
  float* const sums = float_workspace(Workspace::sums, most_tiles * m * tile_columns);

  for (std::int64_t chunk = begin; chunk < end; ++chunk) {
    const std::int64_t column = chunk * chunk_weights;
    const std::int64_t halves = least(2, half_chunks_of(w) - 2 * chunk);
    for (std::int64_t row = 0; row < w.n; row += slab_depth) {
      const std::int64_t depth = least(slab_depth, w.n - row);
      const std::int64_t ahead =
          row + depth < w.n ? depth * w.k / 2 : (chunk_weights - row * w.k) / 2;
      decode_columns<T>(w, scales, row, depth, column, halves, ahead, panel);
      for (std::int64_t c = 0; c < halves * tiles_per_half_chunk; ++c) {
        for (std::int64_t token = 0; token < m; token += tile_rows) {
          multiply({.rows = packed + row * m + token * slab_depth,
                    .columns = panel + c * column_tile_stride,
                    .sums = sums + (c * m + token) * tile_columns,
                    .row_count = least(tile_rows, m - token),
                    .depth = depth,
                    .is_narrow = false,
                    .is_first = row == 0});
        }
      }
    }

    for (std::int64_t token = 0; token < m; ++token) {
      for (std::int64_t h = 0; h < halves; ++h) {
        __m256 columns[8];
        for (std::int64_t c = 0; c < 8; ++c) {
          const std::int64_t tile = h * tiles_per_half_chunk + c / 2;
          columns[c] = _mm256_load_ps(sums + (tile * m + token) * tile_columns + c % 2 * 8);
        }
        transpose8(columns);
        T* const out = dx + token * w.k + column + h * half_chunk_weights;
        for (std::int64_t d = 0; d < 8; ++d) Simd::store(out + 8 * d, {columns[d]});
      }
    }
  }
}

template <typename T>
void grad_input(const T* dy, const NF4Bytes& w, T* dx, std::int64_t m_total, int num_threads) {
  const float* const scales = decode_all_scales<Simd>(w, num_threads);
  const std::int64_t slabs = ceil_divide(w.n, slab_depth);
  for (std::int64_t first = 0; first < m_total; first += tokens_per_pass) {
    const std::int64_t m = least(tokens_per_pass, m_total - first);
    float* const packed = float_workspace(Workspace::packed_activations, slabs * m * slab_depth);
    pack_gradients(dy + first * w.n, m, w.n, packed, num_threads);
    parallel_for(num_threads, ceil_divide(w.k, chunk_weights), 1,
                 [&](std::int64_t begin, std::int64_t end) {
                   grad_input_columns(w, scales, packed, dx + first * w.k, m, begin, end);
                 });
  }
}

}  // namespace
}  // namespace qlora::avx2
