#include "cpu/cpu_kernels.h"

namespace qlora {

const CpuKernels& avx2_kernels() {
  static const CpuKernels kernels = [] {
    CpuKernels set = scalar_kernels();
    set.name = "avx2";
    return set;
  }();
  return kernels;
}

}  // namespace qlora
