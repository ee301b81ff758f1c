#include "cpu/cpu_kernels.h"

namespace qlora {

const CpuKernels& avx512_bf16_kernels() {
  static const CpuKernels kernels = [] {
    CpuKernels set = avx512_kernels();
    set.name = "avx512_bf16";
    return set;
  }();
  return kernels;
}

}  // namespace qlora
