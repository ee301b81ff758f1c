#include "cpu/avx512/kernels.h"

namespace qlora {

const CpuKernels& avx512_kernels() {
  static const CpuKernels kernels = [] {
    CpuKernels set = avx2_kernels();
    set.name = "avx512";
    set.dropout = avx512::dropout;
    set.adamw_step = avx512::adamw_step;
    set.adamw8bit_step = avx512::adamw8bit_step;
    return set;
  }();
  return kernels;
}

}  // namespace qlora
