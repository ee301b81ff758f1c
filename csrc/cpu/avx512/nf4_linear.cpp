#include "cpu/avx512/few_tokens.h"
#include "cpu/avx512/float_engine.h"
#include "cpu/avx512/kernels.h"
#include "cpu/avx512/tile_product.h"

namespace qlora::avx512 {

void nf4_linear(const TensorView& x, const NF4Bytes& weight, const TensorView& bias,
                const TensorView& y, int num_threads) {
  if (!is_chunked(weight)) return avx2_kernels().nf4_linear(x, weight, bias, y, num_threads);
  with_float_type(x.dtype, [&]<typename T>(T) {
    const auto product =
        x.shape[0] <= few_tokens ? forward_few<FloatEngine<T>> : forward<FloatEngine<T>>;
    product(x.as<const T>(), weight, bias.is_present ? bias.as<const T>() : nullptr, y.as<T>(),
            x.shape[0], num_threads);
  });
}

void nf4_linear_grad_input(const TensorView& dy, const NF4Bytes& weight, const TensorView& dx,
                           int num_threads) {
  if (!is_chunked(weight)) return avx2_kernels().nf4_linear_grad_input(dy, weight, dx, num_threads);
  with_float_type(dy.dtype, [&]<typename T>(T) {
    grad_input<FloatEngine<T>>(dy.as<const T>(), weight, dx.as<T>(), dy.shape[0], num_threads);
  });
}

}  // namespace qlora::avx512
