#include "cpu/avx512/few_tokens.h"
#include "cpu/avx512/row_products.h"
#include "cpu/avx512/tile_product.h"
#include "cpu/avx512_bf16/bfloat16_tiles.h"
#include "cpu/avx512_bf16/kernels.h"

namespace qlora::avx512_bf16 {
namespace {

using avx512::TileProduct;

/// Products by `vdpbf16ps`: 32 products, 2 to each of 16 fp32 sums.
struct DotProductEngine : avx512::BFloat16Tiles {
  static void begin() {}
  static void end() {}

  static void multiply(const TileProduct& p) { avx512::multiply_row_tiles<DotProductEngine>(p); }
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
