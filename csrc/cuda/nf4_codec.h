// The launchers of the codec's kernels. They queue work on a stream of the current device and do
// not wait for it.
//
// Preconditions: the arguments are validated (core/operations.cpp), fp32 scales are aligned to 4
// bytes.
#pragma once

#include <cstddef>

#include <cuda_runtime_api.h>

#include "core/operations.h"

namespace qlora::cuda {

/// Device memory that nf4_quantize needs beside its output:
///
///   first_bad_block   uint64
///   absmax            fp32 a block, if nested    (plain scales are written straight to the output)
///   sums              fp64 for 256 blocks, if nested
struct NF4QuantizeScratch {
  unsigned long long* first_bad_block;
  float* absmax;
  double* sums;

  static std::size_t bytes_for(const NF4Weight& out);
  /// `memory` is aligned to 16 bytes and holds bytes_for(out).
  NF4QuantizeScratch(std::byte* memory, const NF4Weight& out);
};

/// nf4_quantize, but that *scratch.first_bad_block becomes the first block with a NaN or Inf, or
/// else stays no block.
void launch_nf4_quantize(const TensorView& w, const NF4Weight& out,
                         const NF4QuantizeScratch& scratch, cudaStream_t stream);

inline constexpr unsigned long long no_bad_block = ~0ull;

void launch_nf4_dequantize(const NF4Weight& weight, const TensorView& out, cudaStream_t stream);

void launch_nf4_dequantize_absmax(const NF4Weight& weight, float* out, cudaStream_t stream);

}  // namespace qlora::cuda
