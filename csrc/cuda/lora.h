// The launchers of LoRA's kernels. They queue work on a stream of the current device and do not
// wait for it. Arguments are validated (core/operations.cpp).
//
// What a call moves, in 16-bit types, beside the factors and t, u (which are some r / k of it):
//
//   forward    x once, y read and written           2 mk + 4 mn bytes
//   backward   dy twice, x once, dx read and written  4 mn + 6 mk bytes
//
// dy is read twice, for u = scaling * dy · B and for grad_b = scaling * dyᵀ · t. One pass over
// [128 tokens, 128 columns] tiles would have to write a partial sum of grad_b for every 128 tokens,
// and read it again: m / 128 * n * r * 8 bytes, half of the 2 mn bytes that it saves at r = 16 and
// twice as many at r = 64; and the second pass finds in L2 what fits there (60 MB on an H200).
//
// The pass over y could be saved altogether. A forward product of the base weight that holds a
// [tokens, columns] tile of y in fp32 has only to add scaling * t · Bᵀ to it before it rounds: 2 r
// operations an element, and 4 mn bytes less, which at m = 8192 and n = 4096 are 31 µs of an H200's
// memory beside some 350 µs of the product. It takes tiles of t and B in that kernel's shared memory,
// sums of their own or a scaling that is rounded into B, a shrink that ends before it begins, and one
// operation that knows both; and y changes in its last bit, as it is rounded once instead of twice.
#pragma once

#include <cuda_runtime_api.h>

#include "core/operations.h"

namespace qlora::cuda {

void launch_lora_forward(const LoRAForward& arguments, cudaStream_t stream);

void launch_lora_backward(const LoRABackward& arguments, cudaStream_t stream);

}  // namespace qlora::cuda
