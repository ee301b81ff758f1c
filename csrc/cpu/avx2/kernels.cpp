#include "cpu/avx2/kernels.h"

namespace qlora {

const CpuKernels& avx2_kernels() {
  static const CpuKernels kernels = [] {
    CpuKernels set = scalar_kernels();
    set.name = "avx2";
    set.nf4_linear = avx2::nf4_linear;
    set.nf4_linear_grad_input = avx2::nf4_linear_grad_input;
    return set;
  }();
  return kernels;
}

}  // namespace qlora
