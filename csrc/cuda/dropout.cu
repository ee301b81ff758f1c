// Queues dropout's kernel.
#include "cuda/dropout.h"

#include "cuda/dropout.cuh"
#include "cuda/launch.cuh"

namespace qlora::cuda {

void launch_dropout(const TensorView& x, double p, const TensorView& seed, const TensorView& out,
                    cudaStream_t stream) {
  const std::int64_t count = x.numel();
  if (count == 0) return;
  const auto addresses =
      reinterpret_cast<std::uintptr_t>(x.data) | reinterpret_cast<std::uintptr_t>(out.data);
  with_float_type(x.dtype, [&]<typename T>(T) {
    const DropoutArguments<T> arguments{.x = x.as<const T>(),
                                        .out = out.as<T>(),
                                        .element_count = count,
                                        .seed = seed.as<const std::int64_t>(),
                                        .mask = DropoutMask(p, 0),
                                        .is_aligned = addresses % 16 == 0};
    launch("dropout", dropout_kernel<T>,
           {thread_blocks_for_items(ceil_divide(count, elements_per_chunk<T>),
                                    threads_per_thread_block),
            threads_per_thread_block},
           stream, arguments);
  });
}

}  // namespace qlora::cuda
