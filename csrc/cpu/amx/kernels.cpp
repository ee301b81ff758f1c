#include "cpu/cpu_kernels.h"

namespace qlora {

const CpuKernels& amx_kernels() {
  static const CpuKernels kernels = [] {
    CpuKernels set = avx512_bf16_kernels();
    set.name = "amx";
    return set;
  }();
  return kernels;
}

}  // namespace qlora
