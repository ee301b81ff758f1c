// The kernels of this set.
#pragma once

#include "cpu/cpu_kernels.h"

namespace qlora::avx2 {

void nf4_linear(const TensorView& x, const NF4Bytes& weight, const TensorView& bias,
                const TensorView& y, int num_threads);
void nf4_linear_grad_input(const TensorView& dy, const NF4Bytes& weight, const TensorView& dx,
                           int num_threads);

}  // namespace qlora::avx2
