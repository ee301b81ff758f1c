// The products of simd/lora.h in fp32, for activations of any float dtype: what it asks of an engine.
#pragma once

#include "cpu/simd/lora.h"

namespace qlora {
namespace {

/// Engine of cpu/simd/lora.h. Every product is fma in fp32, in one order of summation for an element
/// whatever the split: over the columns of a chunk in `lanes` partial sums, over tokens one by one.
template <typename SimdType, typename T>
struct FloatLoRA {
  using Simd = SimdType;
  using Activation = T;
  using LeftElement = float;
  using Floats = typename Simd::Floats;
  using Left = LeftOperand<float>;
  static constexpr std::int64_t lanes = Simd::lanes;
  static constexpr std::int64_t token_multiple = 1;
  static constexpr std::int64_t rank_multiple = lanes;

  // Sums in registers: 16 of AVX-512's 32, 8 of AVX2's 16; the rest are operands.
  static constexpr int rows = 4;
  static constexpr int columns = lanes == 16 ? 4 : 2;

  // The factors are multiplied as they are.
  static void begin() {}
  static void end() {}
  static std::int64_t packed_floats(const LoRASizes&) { return 0; }
  static std::int64_t scratch_floats(const LoRASizes&) { return 0; }
  static void pack_dot(const LoRASizes&, std::int64_t, const ChunkMemory&) {}
  static void pack_update(const LoRASizes&, std::int64_t, const ChunkMemory&) {}
  static void finish_left(const Left&, const LoRASizes&, std::int64_t, std::int64_t) {}

  /// partial[token, rank] = x · factorᵀ over the columns of the block.
  static void dot(const LoRASizes& sizes, const Block<const T>& x, const ChunkMemory& memory,
                  float* partial) {
    std::int64_t i = 0;
    for (; i + rows <= x.tokens; i += rows) dot_rows<rows>(sizes, x, memory, partial, i);
    for (; i < x.tokens; ++i) dot_rows<1>(sizes, x, memory, partial, i);
  }

  /// y += scaling · left · factor, of the block's tokens, which start at `token`.
  static void update(const LoRASizes& sizes, const Left& left, std::int64_t token,
                     const Block<T>& y, const ChunkMemory& memory, float scaling) {
    std::int64_t i = 0;
    for (; i + rows <= y.tokens; i += rows) {
      update_rows<rows>(sizes, left, token, y, memory, scaling, i);
    }
    for (; i < y.tokens; ++i) update_rows<1>(sizes, left, token, y, memory, scaling, i);
  }

  /// sums[rank, column] += leftᵀ · x.
  static void add_outer(const LoRASizes& sizes, const Left& left, std::int64_t token,
                        const Block<const T>& x, const ChunkMemory& memory) {
    constexpr std::int64_t width = 2 * lanes;
    std::int64_t c = 0;
    for (; c + width <= x.columns; c += width) {
      add_outer_columns<2>(sizes, left, token, x, memory, c);
    }
    for (; c < x.columns; c += lanes) add_outer_columns<1>(sizes, left, token, x, memory, c);
  }

 private:
  QLORA_INLINE static Floats load_some(const T* p, std::int64_t there) {
    return there >= lanes ? Simd::load(p) : Simd::load_partial(p, there);
  }

  template <int row_count>
  QLORA_INLINE static void dot_rows(const LoRASizes& sizes, const Block<const T>& x,
                                    const ChunkMemory& memory, float* partial, std::int64_t i) {
    const T* const x_rows = x.rows + i * x.stride;
    for (std::int64_t rank = 0; rank < sizes.ranks; rank += columns) {
      Floats sums[row_count][columns];
      for (auto& row : sums) {
        for (Floats& sum : row) sum = Simd::zero();
      }
      const float* const factor = memory.factor + rank * memory.stride;
      const auto add_products = [&](std::int64_t c, auto&& load) __attribute__((always_inline)) {
        Floats factors[columns];
#pragma GCC unroll 4
        for (int q = 0; q < columns; ++q) factors[q] = Simd::load(factor + q * memory.stride + c);
#pragma GCC unroll 4
        for (int row = 0; row < row_count; ++row) {
          const Floats value = load(x_rows + row * x.stride + c);
#pragma GCC unroll 4
          for (int q = 0; q < columns; ++q) {
            sums[row][q] = Simd::fma(value, factors[q], sums[row][q]);
          }
        }
      };
      std::int64_t c = 0;
      for (; c + lanes <= x.columns; c += lanes) {
        add_products(c, [](const T* p) __attribute__((always_inline)) { return Simd::load(p); });
      }
      if (c < x.columns) {
        add_products(
            c, [&](const T* p)
                   __attribute__((always_inline)) { return Simd::load_partial(p, x.columns - c); });
      }
      for (int row = 0; row < row_count; ++row) {
        for (int q = 0; q < columns; ++q) {
          partial[(i + row) * sizes.padded_ranks + rank + q] = Simd::sum(sums[row][q]);
        }
      }
    }
  }

  template <int row_count>
  QLORA_INLINE static void update_rows(const LoRASizes& sizes, const Left& left, std::int64_t token,
                                       const Block<T>& y, const ChunkMemory& memory, float scaling,
                                       std::int64_t i) {
    std::int64_t c = 0;
    for (; c + columns * lanes <= y.columns; c += columns * lanes) {
      update_tile<row_count, columns>(sizes, left, token, y, memory, scaling, i, c, lanes);
    }
    for (; c < y.columns; c += lanes) {
      update_tile<row_count, 1>(sizes, left, token, y, memory, scaling, i, c, y.columns - c);
    }
  }

  template <int row_count, int column_count>
  QLORA_INLINE static void update_tile(const LoRASizes& sizes, const Left& left, std::int64_t token,
                                       const Block<T>& y, const ChunkMemory& memory, float scaling,
                                       std::int64_t i, std::int64_t c, std::int64_t there) {
    Floats sums[row_count][column_count];
    for (auto& row : sums) {
      for (Floats& sum : row) sum = Simd::zero();
    }
    const float* factor = memory.factor + c;
    const float* const left_rows = left.by_token + (token + i) * sizes.padded_ranks;
    for (std::int64_t rank = 0; rank < sizes.ranks; ++rank, factor += memory.stride) {
      Floats factors[column_count];
#pragma GCC unroll 4
      for (int v = 0; v < column_count; ++v) factors[v] = Simd::load(factor + v * lanes);
#pragma GCC unroll 4
      for (int row = 0; row < row_count; ++row) {
        const Floats value = Simd::broadcast(left_rows[row * sizes.padded_ranks + rank]);
#pragma GCC unroll 4
        for (int v = 0; v < column_count; ++v) {
          sums[row][v] = Simd::fma(value, factors[v], sums[row][v]);
        }
      }
    }
    const Floats scale = Simd::broadcast(scaling);
#pragma GCC unroll 4
    for (int row = 0; row < row_count; ++row) {
#pragma GCC unroll 4
      for (int v = 0; v < column_count; ++v) {
        T* const out = y.rows + (i + row) * y.stride + c + v * lanes;
        if (there >= lanes) {
          Simd::store(out, Simd::fma(scale, sums[row][v], Simd::load(out)));
        } else {
          const Floats before = Simd::load_partial(out, there);
          Simd::store_partial(out, Simd::fma(scale, sums[row][v], before), there);
        }
      }
    }
  }

  template <int column_count>
  QLORA_INLINE static void add_outer_columns(const LoRASizes& sizes, const Left& left,
                                             std::int64_t token, const Block<const T>& x,
                                             const ChunkMemory& memory, std::int64_t c) {
    constexpr int ranks_at_once = lanes == 16 ? 8 : 4;
    const std::int64_t there = x.columns - c;
    for (std::int64_t rank = 0; rank < sizes.ranks; rank += ranks_at_once) {
      Floats sums[ranks_at_once][column_count];
      float* const out = memory.sums + rank * memory.stride + c;
#pragma GCC unroll 8
      for (int q = 0; q < ranks_at_once; ++q) {
#pragma GCC unroll 2
        for (int v = 0; v < column_count; ++v) {
          sums[q][v] = Simd::load(out + q * memory.stride + v * lanes);
        }
      }
      const T* row = x.rows + c;
      const float* ranks = left.by_token + token * sizes.padded_ranks + rank;
      for (std::int64_t i = 0; i < x.tokens; ++i, row += x.stride, ranks += sizes.padded_ranks) {
        Floats values[column_count];
#pragma GCC unroll 2
        for (int v = 0; v < column_count; ++v) values[v] = load_some(row + v * lanes, there);
#pragma GCC unroll 8
        for (int q = 0; q < ranks_at_once; ++q) {
          const Floats factor = Simd::broadcast(ranks[q]);
#pragma GCC unroll 2
          for (int v = 0; v < column_count; ++v) {
            sums[q][v] = Simd::fma(factor, values[v], sums[q][v]);
          }
        }
      }
#pragma GCC unroll 8
      for (int q = 0; q < ranks_at_once; ++q) {
#pragma GCC unroll 2
        for (int v = 0; v < column_count; ++v) {
          Simd::store(out + q * memory.stride + v * lanes, sums[q][v]);
        }
      }
    }
  }
};

}  // namespace
}  // namespace qlora
