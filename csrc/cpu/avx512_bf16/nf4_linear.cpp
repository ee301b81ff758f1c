#include "cpu/avx512/few_tokens.h"
#include "cpu/avx512/tile_product.h"
#include "cpu/avx512_bf16/bfloat16_tiles.h"
#include "cpu/avx512_bf16/kernels.h"

namespace qlora::avx512_bf16 {
namespace {

using avx512::tile_floats;
using avx512::TileProduct;

/// Products by `vdpbf16ps`: 32 products, 2 to each of 16 fp32 sums.
struct DotProductEngine : avx512::BFloat16Tiles {
  static void begin() {}
  static void end() {}

  static void multiply(const TileProduct& p) {
    for (std::int64_t r = 0; r < p.row_tiles; ++r) {
      for (std::int64_t row = 0; row < 16 && r * 16 + row < p.row_count; row += 8) {
        if (p.column_tiles == 2) {
          multiply_rows<2>(p, r, row);
        } else {
          multiply_rows<1>(p, r, row);
        }
      }
    }
  }

 private:
  template <int column_tiles>
  QLORA_INLINE static void multiply_rows(const TileProduct& p, std::int64_t row_tile,
                                         std::int64_t row) {
    __m512 sums[8][column_tiles];
    float* const out = p.sums + row_tile * p.sums_row_stride + row * 16;
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
#pragma GCC unroll 2
      for (int c = 0; c < column_tiles; ++c) {
        sums[i][c] =
            p.is_first ? _mm512_setzero_ps() : _mm512_load_ps(out + c * tile_floats + i * 16);
      }
    }
    const float* a = p.a + row_tile * p.a_stride + row * 16;
    const float* b = p.b;
    for (std::int64_t tile = 0; tile < p.inner_tiles; ++tile) {
#pragma GCC unroll 2
      for (int d = 0; d < 16; ++d) {
        __m512bh columns[column_tiles];
        for (int c = 0; c < column_tiles; ++c) {
          columns[c] = (__m512bh)_mm512_load_ps(b + c * p.b_stride + d * 16);
        }
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
          const auto weight = (__m512bh)_mm512_set1_ps(a[i * 16 + d]);
          for (int c = 0; c < column_tiles; ++c) {
            sums[i][c] = _mm512_dpbf16_ps(sums[i][c], weight, columns[c]);
          }
        }
      }
      a += tile_floats;
      b += tile_floats;
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
#pragma GCC unroll 2
      for (int c = 0; c < column_tiles; ++c) {
        _mm512_store_ps(out + c * tile_floats + i * 16, sums[i][c]);
      }
    }
  }
};

}  // namespace

void nf4_linear(const TensorView& x, const NF4Bytes& weight, const TensorView& bias,
                const TensorView& y, int num_threads) {
  if (x.dtype != DType::bfloat16 || !is_chunked(weight)) {
    return avx512_kernels().nf4_linear(x, weight, bias, y, num_threads);
  }
  const auto forward = x.shape[0] <= avx512::few_tokens ? avx512::forward_few<DotProductEngine>
                                                        : avx512::forward<DotProductEngine>;
  forward(x.as<const BFloat16>(), weight, bias.is_present ? bias.as<const BFloat16>() : nullptr,
          y.as<BFloat16>(), x.shape[0], num_threads);
}

void nf4_linear_grad_input(const TensorView& dy, const NF4Bytes& weight, const TensorView& dx,
                           int num_threads) {
  if (dy.dtype != DType::bfloat16 || !is_chunked(weight)) {
    return avx512_kernels().nf4_linear_grad_input(dy, weight, dx, num_threads);
  }
  avx512::grad_input<DotProductEngine>(dy.as<const BFloat16>(), weight, dx.as<BFloat16>(),
                                       dy.shape[0], num_threads);
}

}  // namespace qlora::avx512_bf16
