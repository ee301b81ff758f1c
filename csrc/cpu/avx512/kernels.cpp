#include "cpu/cpu_kernels.h"

namespace qlora {

const CpuKernels& avx512_kernels() {
  static const CpuKernels kernels = [] {
    CpuKernels set = avx2_kernels();
    set.name = "avx512";
    return set;
  }();
  return kernels;
}

}  // namespace qlora
