// Decoding on the device: the levels and the scales of a weight.
#pragma once

#include <cstdint>

#include "core/operations.h"
#include "cuda/ptx.cuh"
#include "format/nf4_layout.h"

namespace qlora::cuda {

struct NF4Levels {
  float values[nf4_level_count];
};

constexpr NF4Levels make_nf4_levels() {
  NF4Levels levels{};
  for (int code = 0; code < nf4_level_count; ++code) levels.values[code] = nf4_level(code);
  return levels;
}

// Device memory, not `constexpr`: a device function indexes them at run time. Both stay in L1.
static __device__ const NF4Levels device_levels = make_nf4_levels();
static __device__ const DynamicMap device_signed_map = signed_dynamic_map;

/// nf4_level for a whole warp: a lane holds one level and looks the others up by a shuffle, so all
/// lanes must call it together.
///
/// A shuffle costs what a conflict-free read of shared memory does (32 lanes a clock), and needs no
/// table to be filled first.
class WarpLevels {
 public:
  __device__ explicit WarpLevels(int lane) : level_(device_levels.values[lane % nf4_level_count]) {}

  /// Only the low 4 bits of `code` count.
  __device__ float operator()(std::uint32_t code) const {
    return __shfl_sync(all_lanes, level_, static_cast<int>(code), nf4_level_count);
  }

 private:
  float level_;
};

inline constexpr int nf4_blocks_per_nested_block_log2 = 8;
static_assert(1 << nf4_blocks_per_nested_block_log2 == nf4_blocks_per_nested_block);

/// The stored scales of a weight, in device memory.
struct NF4Scales {
  const std::uint8_t* absmax;
  const float* nested_absmax;  // null: plain scales, absmax holds fp32
  const float* nested_offset;  // null: plain scales
};

inline NF4Scales scales_of(const NF4Weight& weight) {
  return {weight.absmax.as<const std::uint8_t>(),
          weight.is_nested() ? weight.nested_absmax.as<const float>() : nullptr,
          weight.is_nested() ? weight.nested_offset.as<const float>() : nullptr};
}

/// Reads absmax in fp32, nested or not, in two steps: so that a kernel can have several loads under
/// way before it waits for one.
template <bool is_nested>
class ScaleReader {
 public:
  struct Stored {
    std::uint32_t q;
    float absmax;  // nested: of the 256 blocks
  };

  __device__ explicit ScaleReader(const NF4Scales& scales)
      : scales_(scales), offset_(is_nested ? *scales.nested_offset : 0.0f) {}

  __device__ Stored load(std::int64_t block) const {
    if constexpr (is_nested) {
      return {scales_.absmax[block],
              scales_.nested_absmax[block >> nf4_blocks_per_nested_block_log2]};
    } else {
      return {0, reinterpret_cast<const float*>(scales_.absmax)[block]};
    }
  }

  __device__ float decode(Stored stored) const {
    if constexpr (!is_nested) return stored.absmax;
    return multiply_then_add(device_signed_map.values[stored.q], stored.absmax, offset_);
  }

 private:
  NF4Scales scales_;
  float offset_;
};

/// ScaleReader for a kernel that learns when it runs whether the scales are nested.
class AnyScaleReader {
 public:
  using Stored = ScaleReader<true>::Stored;

  __device__ explicit AnyScaleReader(const NF4Scales& scales)
      : scales_(scales), offset_(is_nested() ? *scales.nested_offset : 0.0f) {}

  /// `Block` is an integer type that the number of blocks fits.
  template <typename Block>
  __device__ Stored load(Block block) const {
    if (!is_nested()) return {0, reinterpret_cast<const float*>(scales_.absmax)[block]};
    return {scales_.absmax[block],
            scales_.nested_absmax[block >> nf4_blocks_per_nested_block_log2]};
  }

  __device__ float decode(Stored stored) const {
    if (!is_nested()) return stored.absmax;
    return multiply_then_add(device_signed_map.values[stored.q], stored.absmax, offset_);
  }

 private:
  __device__ bool is_nested() const { return scales_.nested_offset != nullptr; }

  NF4Scales scales_;
  float offset_;
};

}  // namespace qlora::cuda
