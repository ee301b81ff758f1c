// What the processor and the operating system let this process run.
#pragma once

namespace qlora {

struct CpuFeatures {
  bool avx2 = false;         // AVX2, FMA and F16C
  bool avx512 = false;       // AVX-512 F, BW, DQ and VL, and avx2
  bool avx512_bf16 = false;  // AVX512-BF16, and avx512
  bool amx_bf16 = false;     // AMX tiles of bfloat16, granted by the kernel, and avx512_bf16
};

/// Asked once. On processors other than x86-64 nothing is there.
const CpuFeatures& cpu_features();

}  // namespace qlora
