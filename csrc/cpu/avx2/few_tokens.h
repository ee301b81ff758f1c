// y[m, n] = x[m, k] · Wᵀ of a few tokens, as dot products in the order in which codes decode: a
// decoded vector is multiplied with all tokens while it is in a register and never stored.
#pragma once

#include "cpu/avx2/nf4_decode.h"
#include "cpu/avx2/transpose.h"

namespace qlora::avx2 {
namespace {

// With more tokens, loading them for each vector of weights costs more than storing the weights.
constexpr std::int64_t most_few_tokens = 4;

// Rows of W that share the loads of x.
constexpr int rows_of_few_tokens = 2;

/// x as [half chunk][token][plane][lane].
template <typename T>
void pack_few_tokens(const T* x, std::int64_t m, std::int64_t k, float* packed, int num_threads) {
  parallel_for(num_threads, k / half_chunk_weights, grain_for(m * half_chunk_weights),
               [&](std::int64_t begin, std::int64_t end) {
                 for (std::int64_t half = begin; half < end; ++half) {
                   for (std::int64_t token = 0; token < m; ++token) {
                     const T* const columns = x + token * k + half * half_chunk_weights;
                     float* const out = packed + (half * m + token) * half_chunk_weights;
                     __m256 planes[8];
                     for (int d = 0; d < 8; ++d) planes[d] = Simd::load(columns + 8 * d).v;
                     transpose8(planes);
                     for (int c = 0; c < 8; ++c) _mm256_store_ps(out + 8 * c, planes[c]);
                   }
                 }
               });
}

/// y of `tokens` tokens and `rows` rows of W from `row` on.
template <typename T, int tokens, int rows>
void multiply_few_tokens(const NF4Bytes& w, const float* scales, const float* packed, const T* bias,
                         T* y, std::int64_t row) {
  // A sum waits for the one before it: more of them, where there are few tokens.
  constexpr int chains = tokens <= 2 ? 2 : 1;
  // Codes that are asked for early, within a row and from its end into the next. With 1 KB of them
  // a call takes a quarter longer where they come from memory.
  constexpr std::int64_t bytes_ahead = 4096;
  const std::int64_t halves = half_chunks_of(w);
  const std::uint8_t* const codes = w.codes + row * w.k / 2;
  const float* const row_scales = scales + row * halves;
  __m256 sums[rows][tokens][chains];
  for (auto& row_sums : sums) {
    for (auto& token_sums : row_sums) {
      for (__m256& sum : token_sums) sum = _mm256_setzero_ps();
    }
  }
  // Tables are made half a chunk early, beside products that do not wait for them. There is a scale
  // after the last one.
  DecodeTable<T> tables[rows];
  for (int r = 0; r < rows; ++r) tables[r] = make_decode_table<T>(row_scales[r * halves]);
  for (std::int64_t half = 0; half < halves; ++half) {
    const float* const x = packed + half * tokens * half_chunk_weights;
#pragma GCC unroll 2
    for (int r = 0; r < rows; ++r) {
      const std::uint8_t* const here = codes + r * (w.k / 2) + half * half_chunk_bytes;
      prefetch_codes(here + bytes_ahead);
      const auto table = tables[r];
      tables[r] = make_decode_table<T>(row_scales[r * halves + half + 1]);
      const auto multiply = [&](int c, __m256 plane) __attribute__((always_inline)) {
#pragma GCC unroll 4
        for (int t = 0; t < tokens; ++t) {
          __m256& sum = sums[r][t][c % 4 / 2 % chains];
          sum = _mm256_fmadd_ps(plane, _mm256_load_ps(x + t * half_chunk_weights + 8 * c), sum);
        }
      };
      decode_half_chunk<T>(here, table, multiply);
    }
  }
  for (int r = 0; r < rows; ++r) {
    for (int t = 0; t < tokens; ++t) {
      __m256 sum = sums[r][t][0];
      for (int i = 1; i < chains; ++i) sum = _mm256_add_ps(sum, sums[r][t][i]);
      const float dot = Simd::sum({sum});
      const auto biased = bias ? Simd::broadcast(dot) + Simd::load_partial(bias + row + r, 1)
                               : Simd::broadcast(dot);
      Simd::store_partial(y + t * w.n + row + r, biased, 1);
    }
  }
}

template <typename T, int tokens>
void forward_few_tokens(const NF4Bytes& w, const float* scales, const float* packed, const T* bias,
                        T* y, int num_threads) {
  parallel_for(num_threads, w.n, rows_of_few_tokens * grain_for(rows_of_few_tokens * w.k),
               [&](std::int64_t begin, std::int64_t end) {
                 std::int64_t row = begin;
                 for (; row + rows_of_few_tokens <= end; row += rows_of_few_tokens) {
                   multiply_few_tokens<T, tokens, rows_of_few_tokens>(w, scales, packed, bias, y,
                                                                      row);
                 }
                 for (; row < end; ++row) {
                   multiply_few_tokens<T, tokens, 1>(w, scales, packed, bias, y, row);
                 }
               });
}

template <typename T>
void forward_few_tokens(const T* x, const NF4Bytes& w, const T* bias, T* y, std::int64_t m,
                        int num_threads) {
  const float* const scales = decode_all_scales<Simd>(w, num_threads);
  float* const packed = float_workspace(Workspace::packed_activations, m * w.k);
  pack_few_tokens(x, m, w.k, packed, num_threads);
  switch (m) {
    case 1: return forward_few_tokens<T, 1>(w, scales, packed, bias, y, num_threads);
    case 2: return forward_few_tokens<T, 2>(w, scales, packed, bias, y, num_threads);
    case 3: return forward_few_tokens<T, 3>(w, scales, packed, bias, y, num_threads);
    case 4: return forward_few_tokens<T, 4>(w, scales, packed, bias, y, num_threads);
  }
}

}  // namespace
}  // namespace qlora::avx2
