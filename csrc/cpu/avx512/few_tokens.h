// y = x · Wᵀ for a handful of tokens, straight from the codes: bound by reading W once. A decoded
// vector is multiplied with all tokens while it is in a register; x is put into its order beforehand.
#pragma once

#include "cpu/avx512/nf4_decode.h"
#include "cpu/thread_pool.h"
#include "cpu/work_split.h"
#include "cpu/workspace.h"

namespace qlora::avx512 {
namespace {

// Beyond, tiles are faster: by vdpbf16ps at 4096 x 4096, 2.0 ms for 8 tokens here, 3.3 for 16 there.
constexpr std::int64_t few_tokens = 8;

/// Rows j to j + row_count - 1 of W with all tokens. The engine's vectors of x are [token][chunk]
/// [plane].
template <typename Engine, int row_count, int token_count>
QLORA_INLINE void dot_rows(const NF4Bytes& w, std::int64_t j, const float* scales,
                           std::int64_t scales_stride, const float* packed,
                           const typename Engine::Activation* bias,
                           typename Engine::Activation* y) {
  constexpr int planes = Engine::planes;
  // Chains of sums of a row, so that those of all rows hide the latency of one. Not by row_count: a
  // row's sums must not depend on where threads cut W.
  constexpr int chains = token_count >= 4 ? 1 : 2;
  const std::int64_t chunks = ceil_divide(w.k, chunk_weights), whole = w.k / chunk_weights;
  const std::int64_t token_stride = chunks * planes * 16;
  constexpr std::int64_t chunk_bytes = chunk_weights / 2, chunks_ahead = 64;
  const std::int64_t row_bytes = w.k / 2;
  // Behind the end of a row: the same place of the rows that come after these, or, of long rows, their
  // beginning.
  const std::int64_t to_next_rows =
      row_count * row_bytes + (chunks > chunks_ahead ? (chunks_ahead - chunks) * chunk_bytes : 0);
  const std::uint8_t* const codes = w.codes + j * row_bytes;
  __m512 sums[row_count][token_count][chains];
  for (auto& row : sums) {
    for (auto& token : row) {
      for (auto& sum : token) sum = _mm512_setzero_ps();
    }
  }
  const auto multiply_chunk = [&]<bool is_whole>(std::int64_t c) __attribute__((always_inline)) {
    const float* const x = packed + c * planes * 16;
    const std::int64_t ahead =
        c + chunks_ahead < chunks ? chunks_ahead * chunk_bytes : to_next_rows;
#pragma GCC unroll 4
    for (int r = 0; r < row_count; ++r) {
      const float* const scale = scales + r * scales_stride + 2 * c;
      typename Engine::Planes decoded;
      Engine::decode(load_codes<is_whole>(codes + r * row_bytes + c * chunk_bytes, ahead), scale[0],
                     is_whole ? scale[1] : 0.0f, decoded);
#pragma GCC unroll 8
      for (int s = 0; s < planes; ++s) {
#pragma GCC unroll 8
        for (int t = 0; t < token_count; ++t) {
          __m512& sum = sums[r][t][s % chains];
          sum = Engine::accumulate(sum, decoded[s], _mm512_load_ps(x + t * token_stride + s * 16));
        }
      }
    }
  };
  for (std::int64_t c = 0; c < whole; ++c) multiply_chunk.template operator()<true>(c);
  if (whole < chunks) multiply_chunk.template operator()<false>(whole);
  for (int r = 0; r < row_count; ++r) {
    for (int t = 0; t < token_count; ++t) {
      __m512 sum = sums[r][t][0];
      for (int chain = 1; chain < chains; ++chain) sum = _mm512_add_ps(sum, sums[r][t][chain]);
      Simd::Floats total = Simd::broadcast(Simd::sum({sum}));
      if (bias) total = total + Simd::load_partial(bias + j + r, 1);
      Simd::store_partial(y + t * w.n + j + r, total, 1);
    }
  }
}

template <typename Engine, int token_count>
void dot_range(const NF4Bytes& w, const float* packed, const typename Engine::Activation* bias,
               typename Engine::Activation* y, std::int64_t begin, std::int64_t end) {
  // Rows at a time are streams from memory: the more of them, the nearer to its bandwidth.
  constexpr int rows = token_count <= 2 ? 4 : 2;
  const std::int64_t halves = half_chunks_of(w);
  float* const scales = float_workspace(Workspace::scales, rows * halves);
  std::int64_t j = begin;
  for (; j + rows <= end; j += rows) {
    decode_half_chunk_scales<Simd>(w, j, j + rows, scales);
    dot_rows<Engine, rows, token_count>(w, j, scales, halves, packed, bias, y);
  }
  for (; j < end; ++j) {
    decode_half_chunk_scales<Simd>(w, j, j + 1, scales);
    dot_rows<Engine, 1, token_count>(w, j, scales, halves, packed, bias, y);
  }
}

/// y[m, n] = x[m, k] · Wᵀ + bias for m <= few_tokens, of a weight that is_chunked.
template <typename Engine>
void forward_few(const typename Engine::Activation* x, const NF4Bytes& w,
                 const typename Engine::Activation* bias, typename Engine::Activation* y,
                 std::int64_t m, int num_threads) {
  const std::int64_t chunks = ceil_divide(w.k, chunk_weights);
  const std::int64_t token_stride = chunks * Engine::planes * 16;
  float* const packed = static_cast<float*>(thread_workspace(
      Workspace::packed_activations, static_cast<std::size_t>(m * token_stride) * sizeof(float)));
  for (std::int64_t t = 0; t < m; ++t) {
    for (std::int64_t c = 0; c < chunks; ++c) {
      Engine::pack_chunk(x + t * w.k + c * chunk_weights, w.k - c * chunk_weights,
                         packed + t * token_stride + c * Engine::planes * 16);
    }
  }
  parallel_for(num_threads, w.n, grain_for(w.k), [&](std::int64_t begin, std::int64_t end) {
    switch (m) {
      case 0: return;
      case 1: return dot_range<Engine, 1>(w, packed, bias, y, begin, end);
      case 2: return dot_range<Engine, 2>(w, packed, bias, y, begin, end);
      case 3: return dot_range<Engine, 3>(w, packed, bias, y, begin, end);
      case 4: return dot_range<Engine, 4>(w, packed, bias, y, begin, end);
      case 5: return dot_range<Engine, 5>(w, packed, bias, y, begin, end);
      case 6: return dot_range<Engine, 6>(w, packed, bias, y, begin, end);
      case 7: return dot_range<Engine, 7>(w, packed, bias, y, begin, end);
      default: return dot_range<Engine, 8>(w, packed, bias, y, begin, end);
    }
  });
}

}  // namespace
}  // namespace qlora::avx512
