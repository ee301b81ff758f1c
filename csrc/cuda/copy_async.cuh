// cp.async: copies from global to shared memory that go on while the thread does other things.
//
//   copy_async_16(...); copy_async_16(...); commit_copies();   one group
//   wait_for_copies<1>();   all groups of this thread but the last 1 have landed
//   __syncthreads();        and those of the other threads
#pragma once

#include "cuda/shared_memory.cuh"

namespace qlora::cuda {

/// Copies 16 bytes past L1, or writes 16 zero bytes unless `is_inside`. Both addresses are aligned to
/// 16 bytes and valid: PTX does not promise that `from` is never touched where no byte of it is
/// copied, so pass one inside of the tensor even then. L2 is asked for the whole line of 128 bytes, of which the next
/// copies are likely to want the rest.
template <typename T>
__device__ void copy_async_16(Shared<T> to, const void* from, bool is_inside = true) {
#if defined(QLORA_CUDA_EMULATION)
  emulator::copy_async(to.pointer(), from, 16, is_inside);
#elif defined(__CUDA_ARCH__)
  const auto address = static_cast<std::uint32_t>(__cvta_generic_to_shared(to.pointer()));
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(address), "l"(from),
               "r"(is_inside ? 16 : 0)
               : "memory");
#endif
}

/// Ends a group.
__device__ inline void commit_copies() {
#if defined(QLORA_CUDA_EMULATION)
  emulator::commit_copies();
#elif defined(__CUDA_ARCH__)
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

/// Waits until at most `pending` of this thread's last groups are on their way.
template <int pending>
__device__ void wait_for_copies() {
#if defined(QLORA_CUDA_EMULATION)
  emulator::wait_for_copies(pending);
#elif defined(__CUDA_ARCH__)
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
#endif
}

}  // namespace qlora::cuda
