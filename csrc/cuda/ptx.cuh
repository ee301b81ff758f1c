// The odd instructions, one named function each. Compiled for the host, where tests run the
// kernels' bodies, a function does the same in C++.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include <cuda_runtime.h>

#include "format/float16.h"

namespace qlora::cuda {

inline constexpr int lanes_per_warp = 32;
inline constexpr unsigned all_lanes = 0xffffffffu;

/// The warp of a thread. The compiler cannot know that thread / 32 is one number for all lanes of a
/// warp; of what lane 0 broadcasts it does know, and does not guard branches on it with the code that
/// brings a divergent warp together again. The whole warp calls this.
__device__ inline int warp_index(int thread) {
  return __shfl_sync(all_lanes, thread / lanes_per_warp, 0);
}

/// What one lane moves by one access at full width.
struct alignas(16) Bytes16 {
  std::uint32_t words[4];
};

struct alignas(8) Bytes8 {
  std::uint32_t words[2];
};

/// Reads memory that nobody reads again: it is the first to leave the caches. `address` is aligned
/// to its type.
template <typename Word>
__device__ Word load_once(const Word* address) {
#if defined(__CUDA_ARCH__)
  return __ldcs(address);
#else
#if defined(QLORA_CUDA_EMULATION)
  emulator::check_aligned(address, sizeof(Word));
#endif
  Word value;
  std::memcpy(&value, address, sizeof value);
  return value;
#endif
}

/// load_once of 16 bytes, aligned.
__device__ inline Bytes16 load_16_bytes_once(const void* address) {
#if defined(__CUDA_ARCH__)
  const uint4 v = __ldcs(static_cast<const uint4*>(address));
  return {{v.x, v.y, v.z, v.w}};
#else
#if defined(QLORA_CUDA_EMULATION)
  emulator::check_aligned(address, 16);
#endif
  Bytes16 value;
  std::memcpy(&value, address, sizeof value);
  return value;
#endif
}

/// `address` is aligned to 16 bytes.
__device__ inline Bytes16 load_16_bytes(const void* address) {
#if defined(__CUDA_ARCH__)
  const uint4 v = *static_cast<const uint4*>(address);
  return {{v.x, v.y, v.z, v.w}};
#else
#if defined(QLORA_CUDA_EMULATION)
  emulator::check_aligned(address, 16);
#endif
  Bytes16 value;
  std::memcpy(&value, address, sizeof value);
  return value;
#endif
}

/// `address` is aligned to 16 bytes.
__device__ inline void store_16_bytes(void* address, const Bytes16& value) {
#if defined(__CUDA_ARCH__)
  *static_cast<uint4*>(address) =
      make_uint4(value.words[0], value.words[1], value.words[2], value.words[3]);
#else
#if defined(QLORA_CUDA_EMULATION)
  emulator::check_aligned(address, 16);
#endif
  std::memcpy(address, &value, sizeof value);
#endif
}

/// store_16_bytes by an instruction for global memory alone, for where the compiler does not find the
/// address space by itself and makes a generic store. (Elsewhere it folds addresses better.)
__device__ inline void store_16_bytes_to_global(void* address, const Bytes16& value) {
#if defined(__CUDA_ARCH__)
  __stwb(static_cast<uint4*>(address),
         make_uint4(value.words[0], value.words[1], value.words[2], value.words[3]));
#else
  store_16_bytes(address, value);
#endif
}

/// `address` is aligned to 8 bytes.
__device__ inline Bytes8 load_8_bytes(const void* address) {
#if defined(__CUDA_ARCH__)
  const uint2 v = *static_cast<const uint2*>(address);
  return {{v.x, v.y}};
#else
#if defined(QLORA_CUDA_EMULATION)
  emulator::check_aligned(address, 8);
#endif
  Bytes8 value;
  std::memcpy(&value, address, sizeof value);
  return value;
#endif
}

/// `address` is aligned to 8 bytes.
__device__ inline void store_8_bytes(void* address, const Bytes8& value) {
#if defined(__CUDA_ARCH__)
  *static_cast<uint2*>(address) = make_uint2(value.words[0], value.words[1]);
#else
#if defined(QLORA_CUDA_EMULATION)
  emulator::check_aligned(address, 8);
#endif
  std::memcpy(address, &value, sizeof value);
#endif
}

/// The largest `value` of the warp's lanes.
__device__ inline std::uint32_t max_of_warp(std::uint32_t value) {
#if defined(__CUDA_ARCH__)
  return __reduce_max_sync(all_lanes, value);
#else
  for (int distance = 1; distance < lanes_per_warp; distance *= 2) {
    const std::uint32_t other = __shfl_xor_sync(all_lanes, value, distance);
    value = value < other ? other : value;
  }
  return value;
#endif
}

/// Byte `i` of a little-endian word, as one instruction.
__device__ inline std::uint32_t byte_of(std::uint32_t word, int i) {
#if defined(__CUDA_ARCH__)
  return __byte_perm(word, 0, 0x4440u + static_cast<unsigned>(i));
#else
  return word >> 8 * i & 0xff;
#endif
}

/// The larger one, or NaN if one of the two is NaN. (fmaxf would return the other.)
__device__ inline float max_or_nan(float a, float b) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
#else
  return std::isnan(a) || a > b ? a : b;
#endif
}

/// a * b + c, rounded twice whatever the compiler's flags: the format's nested scales are defined
/// so.
__device__ inline float multiply_then_add(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(__fmul_rn(a, b), c);
#else
  return a * b + c;
#endif
}

/// a * b + c, rounded once whatever the compiler's flags.
__device__ inline float fused_multiply_add(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#else
  return std::fma(a, b, c);
#endif
}

/// Two fp32 rounded to T, ties to even: `low` in the lower half. As from_float<T>, but for the
/// payload of a NaN.
template <typename T>
__device__ std::uint32_t round_pair(float low, float high) = delete;

template <>
__device__ inline std::uint32_t round_pair<BFloat16>(float low, float high) {
#if defined(__CUDA_ARCH__)
  std::uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#else
  return from_float<BFloat16>(low).bits | std::uint32_t{from_float<BFloat16>(high).bits} << 16;
#endif
}

template <>
__device__ inline std::uint32_t round_pair<Float16>(float low, float high) {
#if defined(__CUDA_ARCH__)
  std::uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#else
  return from_float<Float16>(low).bits | std::uint32_t{from_float<Float16>(high).bits} << 16;
#endif
}

/// to_float, as one instruction where the device has one.
__device__ inline float widen(float x) { return x; }
__device__ inline float widen(BFloat16 x) { return to_float(x); }

__device__ inline float widen(Float16 x) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(x.bits));
  return result;
#else
  return to_float(x);
#endif
}

/// from_float<T>, but for the payload of a NaN.
template <typename T>
__device__ T round_to(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else {
    return T{static_cast<std::uint16_t>(round_pair<T>(x, 0.0f))};
  }
}

}  // namespace qlora::cuda
