// The products of simd/lora.h in bf16, by an engine that multiplies tiles of pairs of bf16: what it
// asks of an engine. Only sources that are compiled for AVX512-BF16 may include it.
//
// Its instructions take subnormal bfloat16 and fp32 as zeros.
#pragma once

#include "cpu/avx512/simd.h"
#include "cpu/avx512/tile_layout.h"
#include "cpu/avx512/transpose.h"
#include "cpu/simd/lora.h"

namespace qlora::avx512 {
namespace {

// Up to as many tokens fp32 is faster: it multiplies with the factors as they lie, where tiles want
// them packed and padded. (r = 16, k = n = 4096, two threads: fp32 takes 0.6 of the time with 1 to 8
// tokens, and the same with 16.)
constexpr std::int64_t few_tokens = 8;

inline bool prefers_tiles(const TensorView& x) {
  return x.dtype == DType::bfloat16 && x.shape[0] > few_tokens;
}

/// A product of 1 or 2 row tiles and 1 or 2 column tiles (cpu/avx512/tile_layout.h). The left
/// operand and the sums are in rows of any length: an activation is multiplied where it is.
struct StridedTileProduct {
  const BFloat16* a;
  std::int64_t a_stride;  // from row to row
  const float* b;
  std::int64_t b_tile_stride;  // from column tile to column tile; inner tiles follow each other
  float* sums;
  std::int64_t sums_stride;  // from row to row; a column tile is 16 columns
  std::int64_t row_tiles, column_tiles;
  std::int64_t inner_pairs;  // the last inner tile may be left out beyond them
  std::int64_t row_count;    // rows that matter; the others may be left out
  bool is_first;             // write, where otherwise the product is added
};

/// 32 fp32, which are bf16 already, as 16 pairs.
QLORA_INLINE __m512i pairs_of(const float* p) {
  return (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(p + 16), _mm512_loadu_ps(p));
}

/// Engine of cpu/simd/lora.h. Multiplier::multiply does a StridedTileProduct, between begin() and
/// end() of its thread.
template <typename Multiplier>
struct TileLoRA {
  using Simd = avx512::Simd;
  using Activation = BFloat16;
  using LeftElement = BFloat16;
  using Left = LeftOperand<BFloat16>;
  static constexpr std::int64_t token_multiple = 32;
  static constexpr std::int64_t rank_multiple = 32;

  static void begin() { Multiplier::begin(); }
  static void end() { Multiplier::end(); }

  static std::int64_t packed_floats(const LoRASizes& sizes) {
    return sizes.padded_ranks * sizes.chunk_columns / 2;
  }
  /// A padded copy of a block; or pairs of its rows, 32 columns at a time; or four tiles of sums.
  static std::int64_t scratch_floats(const LoRASizes& sizes) {
    return token_block * (sizes.chunk_columns + 32) / 2 + 4 * tile_floats;
  }

  /// Column tiles of ranks, [rank tile][inner tile]: 32 columns of the factor of 16 ranks each.
  static void pack_dot(const LoRASizes& sizes, std::int64_t columns, const ChunkMemory& memory) {
    float* tile = memory.packed_dot;
    for (std::int64_t rank = 0; rank < sizes.ranks; rank += 16) {
      for (std::int64_t c = 0; c < columns; c += 32, tile += tile_floats) {
        __m512i rows[16];
        for (std::int64_t i = 0; i < 16; ++i) {
          rows[i] = pairs_of(memory.factor + (rank + i) * memory.stride + c);
        }
        transpose16(rows);
        for (std::int64_t i = 0; i < 16; ++i) _mm512_store_si512(tile + 16 * i, rows[i]);
      }
    }
  }

  /// Column tiles of columns, [32 columns][even or odd][inner tile]: 16 columns of 32 ranks each.
  /// So two sums side by side are those of even and odd columns, as they are in a dword of y.
  static void pack_update(const LoRASizes& sizes, std::int64_t columns, const ChunkMemory& memory) {
    float* even = memory.packed_update;
    const std::int64_t odd = sizes.padded_ranks * 8;  // a row of 16 dwords for two ranks
    for (std::int64_t c = 0; c < columns; c += 32, even += odd) {
      for (std::int64_t rank = 0; rank < sizes.padded_ranks; rank += 2, even += 16) {
        const float* const row = memory.factor + rank * memory.stride + c;
        const __m512i first = pairs_of(row), second = pairs_of(row + memory.stride);
        _mm512_store_si512(
            even, _mm512_mask_blend_epi16(0xaaaaaaaau, first, _mm512_slli_epi32(second, 16)));
        _mm512_store_si512(
            even + odd, _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(first, 16), second));
      }
    }
  }

  /// by_rank of tokens [begin, end).
  static void finish_left(const Left& left, const LoRASizes& sizes, std::int64_t begin,
                          std::int64_t end) {
    for (std::int64_t i = begin; i < end; i += 16) {
      for (std::int64_t rank = 0; rank < sizes.padded_ranks; rank += 16) {
        const BFloat16* const in = left.by_token + i * sizes.padded_ranks + rank;
        BFloat16* const out = left.by_rank + rank * sizes.padded_tokens + i;
        __m512i rows[16];
        for (std::int64_t row = 0; row < 16; ++row) {
          rows[row] = _mm512_cvtepu16_epi32(
              _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + row * sizes.padded_ranks)));
        }
        transpose16(rows);
        for (std::int64_t row = 0; row < 16; ++row) {
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + row * sizes.padded_tokens),
                              _mm512_cvtepi32_epi16(rows[row]));
        }
      }
    }
  }

  /// partial[token, rank] = x · factorᵀ over the columns of the block.
  static void dot(const LoRASizes& sizes, const Block<const BFloat16>& x, const ChunkMemory& memory,
                  float* partial) {
    const Block<const BFloat16> whole = pad(x, memory.scratch);
    const std::int64_t row_tiles = (x.tokens + 15) / 16, rank_tiles = (sizes.ranks + 15) / 16;
    const std::int64_t inner_tiles = whole.columns / 32;
    for (std::int64_t tile = 0; tile < row_tiles; tile += 2) {
      for (std::int64_t rank_tile = 0; rank_tile < rank_tiles; rank_tile += 2) {
        Multiplier::multiply({
            .a = whole.rows + tile * 16 * whole.stride,
            .a_stride = whole.stride,
            .b = memory.packed_dot + rank_tile * inner_tiles * tile_floats,
            .b_tile_stride = inner_tiles * tile_floats,
            .sums = partial + tile * 16 * sizes.padded_ranks + rank_tile * 16,
            .sums_stride = sizes.padded_ranks,
            .row_tiles = lora_least(2, row_tiles - tile),
            .column_tiles = lora_least(2, rank_tiles - rank_tile),
            .inner_pairs = inner_tiles * 16,
            .row_count = x.tokens - tile * 16,
            .is_first = true,
        });
      }
    }
  }

  /// y += scaling · left · factor, of the block's tokens, which start at `token`.
  static void update(const LoRASizes& sizes, const Left& left, std::int64_t token,
                     const Block<BFloat16>& y, const ChunkMemory& memory, float scaling) {
    float* const sums = memory.scratch;
    for (std::int64_t i = 0; i < y.tokens; i += 32) {
      const std::int64_t rows = lora_least(32, y.tokens - i);
      for (std::int64_t c = 0; c < y.columns; c += 32) {
        Multiplier::multiply({
            .a = left.by_token + (token + i) * sizes.padded_ranks,
            .a_stride = sizes.padded_ranks,
            .b = memory.packed_update + c / 32 * sizes.padded_ranks * 16,
            .b_tile_stride = sizes.padded_ranks * 8,
            .sums = sums,
            .sums_stride = 32,
            .row_tiles = (rows + 15) / 16,
            .column_tiles = 2,
            .inner_pairs = (sizes.ranks + 1) / 2,
            .row_count = rows,
            .is_first = true,
        });
        add_sums(sums, scaling, y.rows + i * y.stride + c, y.stride, rows, y.columns - c);
      }
    }
  }

  /// sums[rank, column] += leftᵀ · x.
  static void add_outer(const LoRASizes& sizes, const Left& left, std::int64_t token,
                        const Block<const BFloat16>& x, const ChunkMemory& memory) {
    const std::int64_t rank_tiles = (sizes.ranks + 15) / 16, inner_tiles = (x.tokens + 31) / 32;
    float* const pairs = memory.scratch;
    for (std::int64_t c = 0; c < x.columns; c += 32) {
      pack_token_pairs(x, c, inner_tiles * 16, pairs);
      for (std::int64_t rank_tile = 0; rank_tile < rank_tiles; rank_tile += 2) {
        Multiplier::multiply({
            .a = left.by_rank + rank_tile * 16 * sizes.padded_tokens + token,
            .a_stride = sizes.padded_tokens,
            .b = pairs,
            .b_tile_stride = inner_tiles * tile_floats,
            .sums = memory.sums + rank_tile * 16 * memory.stride + c,
            .sums_stride = memory.stride,
            .row_tiles = lora_least(2, rank_tiles - rank_tile),
            .column_tiles = 2,
            .inner_pairs = (x.tokens + 1) / 2,
            .row_count = sizes.ranks - rank_tile * 16,
            .is_first = false,
        });
      }
    }
  }

 private:
  /// `ahead` elements further, which may be beyond the tensor.
  QLORA_INLINE static void prefetch_row(const BFloat16* p, std::int64_t ahead) {
    _mm_prefetch(reinterpret_cast<const char*>(reinterpret_cast<std::intptr_t>(p) + 2 * ahead),
                 _MM_HINT_T0);
  }

  QLORA_INLINE static __mmask32 first_of_32(std::int64_t there) {
    const std::int64_t count = there < 0 ? 0 : there < 32 ? there : 32;
    return static_cast<__mmask32>((std::uint64_t{1} << count) - 1u);
  }

  /// The block with whole tiles of rows and columns: itself, or a copy filled up with zeros.
  static Block<const BFloat16> pad(const Block<const BFloat16>& x, float* scratch) {
    if (x.tokens % 16 == 0 && x.columns % 32 == 0) return x;
    const std::int64_t rows = round_up(x.tokens, 16), columns = round_up(x.columns, 32);
    const std::int64_t stride = columns + 32;
    BFloat16* const copy = reinterpret_cast<BFloat16*>(scratch);
    for (std::int64_t i = 0; i < rows; ++i) {
      for (std::int64_t c = 0; c < columns; c += 32) {
        const __mmask32 mask = i < x.tokens ? first_of_32(x.columns - c) : 0;
        _mm512_store_si512(copy + i * stride + c,
                           _mm512_maskz_loadu_epi16(mask, x.rows + i * x.stride + c));
      }
    }
    return {copy, stride, rows, columns};
  }

  /// Columns [c, c + 32) of the block as two column tiles whose pairs are tokens, `pair_count` of
  /// them; zeros where there are none.
  QLORA_INLINE static void pack_token_pairs(const Block<const BFloat16>& x, std::int64_t c,
                                            std::int64_t pair_count, float* tiles) {
    const __mmask32 mask = first_of_32(x.columns - c);
    const auto halves_of = [&](std::int64_t i, __m512i& low, __m512i& high) {
      const __m512i row =
          _mm512_maskz_loadu_epi16(i < x.tokens ? mask : 0, x.rows + i * x.stride + c);
      low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(row));
      high = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(row, 1));
    };
    for (std::int64_t pair = 0; pair < pair_count; ++pair) {
      __m512i low[2], high[2];
      halves_of(2 * pair, low[0], high[0]);
      halves_of(2 * pair + 1, low[1], high[1]);
      _mm512_store_si512(tiles + pair * 16, _mm512_or_si512(low[0], _mm512_slli_epi32(low[1], 16)));
      _mm512_store_si512(tiles + (pair_count + pair) * 16,
                         _mm512_or_si512(high[0], _mm512_slli_epi32(high[1], 16)));
    }
  }

  /// from_float<BFloat16> of every lane, in the upper halves.
  QLORA_INLINE static __m512i round_to_upper_halves(__m512 a) {
    const __m512i bits = _mm512_castps_si512(a);
    const __mmask16 is_odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
    const __m512i half =
        _mm512_mask_blend_epi32(is_odd, _mm512_set1_epi32(0x7fff), _mm512_set1_epi32(0x8000));
    return _mm512_mask_mov_epi32(_mm512_add_epi32(bits, half),
                                 _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q),
                                 _mm512_set1_epi32(0x7fc00000));
  }

  /// y += scaling · sums[row], 16 even columns and then 16 odd ones.
  QLORA_INLINE static void add_sums(const float* sums, float scaling, BFloat16* y,
                                    std::int64_t stride, std::int64_t rows, std::int64_t width) {
    const __mmask32 mask = first_of_32(width);
    const __m512 scale = _mm512_set1_ps(scaling);
    for (std::int64_t i = 0; i < rows; ++i, y += stride, sums += 32) {
      prefetch_row(y, 32 * stride);
      const __m512i before = _mm512_maskz_loadu_epi16(mask, y);
      const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(before, 16));
      const __m512 odd = _mm512_castsi512_ps(
          _mm512_and_si512(before, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
      const __m512i new_even =
          round_to_upper_halves(_mm512_fmadd_ps(scale, _mm512_load_ps(sums), even));
      const __m512i new_odd =
          round_to_upper_halves(_mm512_fmadd_ps(scale, _mm512_load_ps(sums + 16), odd));
      _mm512_mask_storeu_epi16(
          y, mask, _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(new_even, 16), new_odd));
    }
  }
};

}  // namespace
}  // namespace qlora::avx512
