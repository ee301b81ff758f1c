#include "cpu/amx/kernels.h"
#include "cpu/amx/sixteen_tokens.h"
#include "cpu/amx/tile_configuration.h"
#include "cpu/avx512/tile_product.h"
#include "cpu/avx512_bf16/bfloat16_tiles.h"

namespace qlora::amx {
namespace {

using avx512::tile_floats;
using avx512::TileProduct;

/// Products by `tdpbf16ps`. Tiles 0 to 3 hold sums[row tile][column tile], 4 and 5 row tiles, 6 and
/// 7 column tiles.
struct TileEngine : avx512::BFloat16Tiles {
  static void begin() { configure_tiles(); }
  static void end() { _tile_release(); }

  static void multiply(const TileProduct& p) {
    if (p.row_tiles == 2) {
      p.column_tiles == 2 ? multiply_tiles<2, 2>(p) : multiply_tiles<2, 1>(p);
    } else {
      p.column_tiles == 2 ? multiply_tiles<1, 2>(p) : multiply_tiles<1, 1>(p);
    }
  }

 private:
  template <int row_tiles, int column_tiles>
  QLORA_INLINE static void multiply_tiles(const TileProduct& p) {
    constexpr bool two_rows = row_tiles == 2, two_columns = column_tiles == 2;
    constexpr int line = 64;  // bytes
    float* const sums0 = p.sums;
    float* const sums1 = p.sums + p.sums_row_stride;
    publish_stores();
    if (p.is_first) {
      _tile_zero(0);
      if (two_columns) _tile_zero(1);
      if (two_rows) _tile_zero(2);
      if (two_rows && two_columns) _tile_zero(3);
    } else {
      _tile_loadd(0, sums0, line);
      if (two_columns) _tile_loadd(1, sums0 + tile_floats, line);
      if (two_rows) _tile_loadd(2, sums1, line);
      if (two_rows && two_columns) _tile_loadd(3, sums1 + tile_floats, line);
    }
    const float* a = p.a;
    const float* b = p.b;
    for (std::int64_t tile = 0; tile < p.inner_tiles; ++tile) {
      _tile_loadd(4, a, line);
      _tile_loadd(6, b, line);
      _tile_dpbf16ps(0, 4, 6);
      if (two_columns) {
        _tile_loadd(7, b + p.b_stride, line);
        _tile_dpbf16ps(1, 4, 7);
      }
      if (two_rows) {
        _tile_loadd(5, a + p.a_stride, line);
        _tile_dpbf16ps(2, 5, 6);
        if (two_columns) _tile_dpbf16ps(3, 5, 7);
      }
      a += tile_floats;
      b += tile_floats;
    }
    _tile_stored(0, sums0, line);
    if (two_columns) _tile_stored(1, sums0 + tile_floats, line);
    if (two_rows) _tile_stored(2, sums1, line);
    if (two_rows && two_columns) _tile_stored(3, sums1 + tile_floats, line);
  }
};

}  // namespace

void nf4_linear(const TensorView& x, const NF4Bytes& weight, const TensorView& bias,
                const TensorView& y, int num_threads) {
  // One token takes no tiles: 22 G weights/s a thread without them, 20 with.
  if (x.dtype != DType::bfloat16 || !is_chunked(weight) || x.shape[0] == 1) {
    return avx512_bf16_kernels().nf4_linear(x, weight, bias, y, num_threads);
  }
  const auto forward = x.shape[0] <= 16
                           ? avx512::forward<TileEngine, forward_rows_of_sixteen<TileEngine>>
                           : avx512::forward<TileEngine>;
  forward(x.as<const BFloat16>(), weight, bias.is_present ? bias.as<const BFloat16>() : nullptr,
          y.as<BFloat16>(), x.shape[0], num_threads);
}

void nf4_linear_grad_input(const TensorView& dy, const NF4Bytes& weight, const TensorView& dx,
                           int num_threads) {
  if (dy.dtype != DType::bfloat16 || !is_chunked(weight)) {
    return avx512_bf16_kernels().nf4_linear_grad_input(dy, weight, dx, num_threads);
  }
  avx512::grad_input<TileEngine>(dy.as<const BFloat16>(), weight, dx.as<BFloat16>(), dy.shape[0],
                                 num_threads);
}

}  // namespace qlora::amx
