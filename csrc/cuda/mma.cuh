// The tensor cores' instructions for a warp: mma.m16n8k16 and ldmatrix. All 32 lanes call them
// together. PTX ISA, sections "Matrix Fragments for mma.m16n8k16 with floating point type" and
// "ldmatrix". Their `.aligned` wants the lanes to be together: put __syncwarp after code that only some
// of them run. The asm is volatile, so that the compiler takes it for more than arithmetic that it may
// put where it likes; that costs no instruction and no register here.
//
// With group = lane / 4 and pair = lane % 4, a lane holds, each register two neighbours along k:
//
//   a[0]  A[group    ][2 pair, +1]      b[0]  B[2 pair,     +1][group]      d[0], d[1]  D[group    ][2 pair, +1]
//   a[1]  A[group + 8][2 pair, +1]      b[1]  B[2 pair + 8, +1][group]      d[2], d[3]  D[group + 8][2 pair, +1]
//   a[2]  A[group    ][2 pair + 8, +1]
//   a[3]  A[group + 8][2 pair + 8, +1]
#pragma once

#include <cstdint>

#include "cuda/shared_memory.cuh"

namespace qlora::cuda {

/// D[16, 8] += A[16, 16] · B[16, 8], products of T in fp32 sums.
template <typename T>
__device__ void multiply_accumulate(float (&d)[4], const std::uint32_t (&a)[4],
                                    const std::uint32_t (&b)[2]) {
  static_assert(sizeof(T) == 2);
#if defined(QLORA_CUDA_EMULATION)
  emulator::multiply_accumulate<T>(d, a, b);
#elif defined(__CUDA_ARCH__)
  if constexpr (std::is_same_v<T, BFloat16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#endif
}

/// Loads four 8 x 8 matrices of 16-bit elements. Lane 8 i + j passes the address of row j of matrix
/// i, 16 bytes, aligned; lane l gets elements 2 (l % 4) and the next of row l / 4 of matrix i in
/// r[i].
template <typename T>
__device__ void load_matrices(std::uint32_t (&r)[4], Shared<T> row) {
#if defined(QLORA_CUDA_EMULATION)
  emulator::load_matrices(r, row.pointer(), false);
#elif defined(__CUDA_ARCH__)
  const auto address = static_cast<std::uint32_t>(__cvta_generic_to_shared(row.pointer()));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
#endif
}

/// load_matrices, each matrix transposed: lane l gets rows 2 (l % 4) and the next of column l / 4.
template <typename T>
__device__ void load_matrices_transposed(std::uint32_t (&r)[4], Shared<T> row) {
#if defined(QLORA_CUDA_EMULATION)
  emulator::load_matrices(r, row.pointer(), true);
#elif defined(__CUDA_ARCH__)
  const auto address = static_cast<std::uint32_t>(__cvta_generic_to_shared(row.pointer()));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
#endif
}

}  // namespace qlora::cuda
