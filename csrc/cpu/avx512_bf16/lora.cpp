#include "cpu/avx512_bf16/kernels.h"
#include "cpu/avx512_bf16/lora_tiles.h"

namespace qlora::avx512_bf16 {
namespace {

using avx512::StridedTileProduct;

/// Products by `vdpbf16ps`: 32 products, 2 to each of 16 fp32 sums.
struct DotProductMultiplier {
  static void begin() {}
  static void end() {}

  static void multiply(const StridedTileProduct& p) {
    const std::int64_t rows = lora_least(p.row_tiles * 16, p.row_count);
    std::int64_t row = 0;
    for (; row + 8 <= rows; row += 8) multiply_rows<8>(p, row);
    for (; row + 4 <= rows; row += 4) multiply_rows<4>(p, row);
    for (; row < rows; ++row) multiply_rows<1>(p, row);
  }

 private:
  template <int rows>
  QLORA_INLINE static void multiply_rows(const StridedTileProduct& p, std::int64_t row) {
    p.column_tiles == 2 ? multiply_block<rows, 2>(p, row) : multiply_block<rows, 1>(p, row);
  }

  template <int rows, int column_tiles>
  QLORA_INLINE static void multiply_block(const StridedTileProduct& p, std::int64_t row) {
    __m512 sums[rows][column_tiles];
    float* const out = p.sums + row * p.sums_stride;
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 2
      for (int c = 0; c < column_tiles; ++c) {
        sums[i][c] =
            p.is_first ? _mm512_setzero_ps() : _mm512_load_ps(out + i * p.sums_stride + c * 16);
      }
    }
    const BFloat16* a = p.a + row * p.a_stride;
    const float* b = p.b;
    for (std::int64_t pair = 0; pair < p.inner_pairs; ++pair, a += 2, b += 16) {
      __m512bh columns[column_tiles];
#pragma GCC unroll 2
      for (int c = 0; c < column_tiles; ++c) {
        columns[c] = (__m512bh)_mm512_load_ps(b + c * p.b_tile_stride);
      }
#pragma GCC unroll 8
      for (int i = 0; i < rows; ++i) {
        const auto left = (__m512bh)_mm512_broadcastd_epi32(_mm_loadu_si32(a + i * p.a_stride));
#pragma GCC unroll 2
        for (int c = 0; c < column_tiles; ++c) {
          sums[i][c] = _mm512_dpbf16_ps(sums[i][c], left, columns[c]);
        }
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 2
      for (int c = 0; c < column_tiles; ++c) {
        _mm512_store_ps(out + i * p.sums_stride + c * 16, sums[i][c]);
      }
    }
  }
};

using Engine = avx512::TileLoRA<DotProductMultiplier>;

}  // namespace

void lora_forward(const LoRAForward& arguments, int num_threads) {
  if (!avx512::prefers_tiles(arguments.x)) {
    return avx512_kernels().lora_forward(arguments, num_threads);
  }
  run_lora_forward<Engine>(arguments, num_threads);
}

void lora_backward(const LoRABackward& arguments, int num_threads) {
  if (!avx512::prefers_tiles(arguments.x)) {
    return avx512_kernels().lora_backward(arguments, num_threads);
  }
  run_lora_backward<Engine>(arguments, num_threads);
}

}  // namespace qlora::avx512_bf16
