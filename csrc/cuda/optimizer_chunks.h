// Which thread block owns which elements of a list of tensors, in the optimisers' kernels. Pure C++:
// the host tests prove that every element has exactly one owner.
//
//   quad    4 consecutive elements: what a thread moves by one access, of 16 bytes (fp32), 8 (16-bit
//           dtypes) or 4 (8-bit codes). Whatever the dtype, the accesses of a warp are consecutive.
//   chunk   4096 consecutive elements of one tensor (its last chunk may be short), owned by one
//           thread block; 16 blocks of 8-bit state
//
// The chunks of a launch are counted through its tensors. A thread block finds the tensor of its
// chunk by bisection of the first chunks, which are in the kernel's parameters.
#pragma once

#include <array>
#include <cstdint>

#include "core/adamw_rule.h"
#include "format/nf4_layout.h"

namespace qlora::cuda {

inline constexpr int elements_per_quad = 4;
inline constexpr int optimizer_threads = 256;
inline constexpr int optimizer_warps = optimizer_threads / 32;
inline constexpr int quads_per_thread = 4;
inline constexpr int elements_per_chunk = optimizer_threads * quads_per_thread * elements_per_quad;

// 8-bit state: a block is a warp's, two quads a lane.
inline constexpr int quads_per_lane = 2;
static_assert(32 * quads_per_lane * elements_per_quad == state_block_size);
inline constexpr int blocks_per_chunk = elements_per_chunk / static_cast<int>(state_block_size);
static_assert(blocks_per_chunk % optimizer_warps == 0);

// The LoRA factors of a model of 32 layers with 7 linear modules each fit one launch. More would fit
// the 32,764 bytes that a kernel's parameters may take, but not many.
inline constexpr int tensors_per_launch = 448;

/// The quad that a thread takes in a step of its chunk (32-bit state), as its first element.
QLORA_HOST_DEVICE constexpr int quad_of_thread(int step, int thread) {
  return (step * optimizer_threads + thread) * elements_per_quad;
}

/// The quad that a lane takes of its warp's block (8-bit state), as its first element.
QLORA_HOST_DEVICE constexpr int quad_of_lane(int i, int lane) {
  return (i * 32 + lane) * elements_per_quad;
}

/// The chunks of the tensors of one launch.
class ChunkTable {
 public:
  /// Adds a tensor, which may have no elements. Returns false where it does not fit any more.
  constexpr bool append(std::int64_t element_count) {
    const std::int64_t chunks = ceil_divide(element_count, elements_per_chunk);
    if (tensor_count_ == tensors_per_launch || chunks > max_chunks - chunk_count_) return false;
    first_chunk_[static_cast<std::size_t>(tensor_count_)] = chunk_count_;
    ++tensor_count_;
    chunk_count_ += static_cast<std::uint32_t>(chunks);
    return true;
  }

  QLORA_HOST_DEVICE constexpr int tensor_count() const { return tensor_count_; }
  QLORA_HOST_DEVICE constexpr std::uint32_t chunk_count() const { return chunk_count_; }

  /// The tensor that owns a chunk: the last one that begins at it or before.
  QLORA_HOST_DEVICE constexpr int tensor_of(std::uint32_t chunk) const {
    int tensor = 0;
    for (int step = 256; step > 0; step /= 2) {
      const int next = tensor + step;
      if (next < tensor_count_ && first_chunk_[static_cast<std::size_t>(next)] <= chunk) {
        tensor = next;
      }
    }
    return tensor;
  }

  /// The first element of a chunk in its tensor.
  QLORA_HOST_DEVICE constexpr std::int64_t first_element(int tensor, std::uint32_t chunk) const {
    return std::int64_t{chunk - first_chunk_[static_cast<std::size_t>(tensor)]} *
           elements_per_chunk;
  }

  /// What a chunk's number and a grid's size may add up to, in 32 bits; 2^43 elements.
  static constexpr std::int64_t max_chunks = std::int64_t{1} << 31;

 private:
  static_assert(tensors_per_launch < 512, "the bisection begins with a step of 256");

  std::array<std::uint32_t, tensors_per_launch> first_chunk_{};
  std::uint32_t chunk_count_ = 0;
  int tensor_count_ = 0;
};

}  // namespace qlora::cuda
