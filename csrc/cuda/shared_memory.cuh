// A thread block's shared memory. Kernels touch it by these functions alone: on the device they are
// plain accesses; on the host, where tests run the kernels' bodies, each is checked (in range,
// written before it is read, ordered by a barrier with what other threads did).
#pragma once

#include <bit>
#include <cstdint>

#include "cuda/ptx.cuh"

namespace qlora::cuda {

/// A pointer into shared memory.
template <typename T>
class Shared {
 public:
  __device__ explicit Shared(T* pointer) : pointer_(pointer) {}

  __device__ T load(int i = 0) const {
#if defined(QLORA_CUDA_EMULATION)
    return emulator::load_shared(pointer_ + i);
#else
    if constexpr (sizeof(T) == 16) {
      const uint4 v = reinterpret_cast<const uint4*>(pointer_)[i];
      return T{{v.x, v.y, v.z, v.w}};
    } else {
      return pointer_[i];
    }
#endif
  }

  __device__ void store(int i, const T& value) const {
#if defined(QLORA_CUDA_EMULATION)
    emulator::store_shared(pointer_ + i, value);
#else
    if constexpr (sizeof(T) == 16) {
      reinterpret_cast<uint4*>(pointer_)[i] =
          make_uint4(value.words[0], value.words[1], value.words[2], value.words[3]);
    } else {
      pointer_[i] = value;
    }
#endif
  }

  __device__ Shared operator+(int offset) const { return Shared(pointer_ + offset); }

  /// The same memory as another type.
  template <typename U>
  __device__ Shared<U> as() const {
    return Shared<U>(reinterpret_cast<U*>(pointer_));
  }

  /// For instructions that take an address, and for nothing else.
  __device__ T* pointer() const { return pointer_; }

 private:
  T* pointer_;
};

/// A table of 8-byte entries in shared memory, at the 32-bit address that the instruction wants: what
/// an index adds to it is one multiply-add, where a pointer's is two.
template <typename T>
class SharedTable {
 public:
  static_assert(sizeof(T) == 8);

  __device__ explicit SharedTable(Shared<T> begin) : begin_(begin) {
#if defined(__CUDA_ARCH__)
    address_ = static_cast<std::uint32_t>(__cvta_generic_to_shared(begin.pointer()));
#endif
  }

  /// Volatile, which keeps it between the barriers that it was written between.
  __device__ T load(std::uint32_t i) const {
#if defined(QLORA_CUDA_EMULATION)
    return begin_.load(static_cast<int>(i));
#elif defined(__CUDA_ARCH__)
    unsigned long long entry;
    asm volatile("ld.shared.b64 %0, [%1];" : "=l"(entry) : "r"(address_ + i * 8));
    return std::bit_cast<T>(entry);
#endif
  }

 private:
  Shared<T> begin_;
  std::uint32_t address_ = 0;
};

/// The shared memory that the launch asked for (launch.cuh), from byte `offset` on. It begins at a
/// multiple of 128 bytes.
template <typename T>
__device__ Shared<T> dynamic_shared_memory(int offset = 0) {
#if defined(QLORA_CUDA_EMULATION)
  return Shared<T>(reinterpret_cast<T*>(emulator::shared_memory() + offset));
#else
  extern __shared__ __align__(128) unsigned char memory[];
  return Shared<T>(reinterpret_cast<T*>(memory + offset));
#endif
}

}  // namespace qlora::cuda
