#include "cpu/avx2/few_tokens.h"
#include "cpu/avx2/forward.h"
#include "cpu/avx2/grad_input.h"
#include "cpu/avx2/kernels.h"

namespace qlora::avx2 {

void nf4_linear(const TensorView& x, const NF4Bytes& weight, const TensorView& bias,
                const TensorView& y, int num_threads) {
  if (!is_chunked(weight)) return scalar_kernels().nf4_linear(x, weight, bias, y, num_threads);
  with_float_type(x.dtype, [&]<typename T>(T) {
    const T* const biases = bias.is_present ? bias.as<const T>() : nullptr;
    const std::int64_t m = x.shape[0];
    if (m <= most_few_tokens) {
      forward_few_tokens(x.as<const T>(), weight, biases, y.as<T>(), m, num_threads);
    } else {
      forward(x.as<const T>(), weight, biases, y.as<T>(), m, num_threads);
    }
  });
}

void nf4_linear_grad_input(const TensorView& dy, const NF4Bytes& weight, const TensorView& dx,
                           int num_threads) {
  if (!is_chunked(weight)) {
    return scalar_kernels().nf4_linear_grad_input(dy, weight, dx, num_threads);
  }
  with_float_type(dy.dtype, [&]<typename T>(T) {
    grad_input(dy.as<const T>(), weight, dx.as<T>(), dy.shape[0], num_threads);
  });
}

}  // namespace qlora::avx2
