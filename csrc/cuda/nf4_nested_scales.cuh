// The kernels that quantise the scales themselves: their mean, and 8-bit codes of what is left.
// nf4_codec.cu launches them; host tests run their bodies.
//
// The sums are fp64 in an order that the format fixes (core/operations.h), as an addition rounds
// and every device must round alike: runs of 256 in index order, then the sums of the runs in index
// order. So a run is one thread's, and their sum is one chain of additions, some 10 clocks each; a
// weight is quantised once.
#pragma once

#include "cuda/nf4_codec_map.h"
#include "cuda/nf4_decode.cuh"
#include "cuda/shared_memory.cuh"
#include "format/block_normalizer.h"

namespace qlora::cuda {

// A run takes a thread microseconds: small thread blocks spread the runs over the SMs.
inline constexpr int threads_per_sum_block = 32;
inline constexpr int threads_per_scale_block = static_cast<int>(nf4_blocks_per_nested_block);
inline constexpr int warps_per_scale_block = threads_per_scale_block / lanes_per_warp;

/// sums[g] = absmax[256 g] + ... + absmax[256 g + 255] in fp64, in index order.
///
///   absmax fp32 [block_count], sums fp64 [ceil(block_count / 256)]; a thread owns a run
static __global__ void __launch_bounds__(threads_per_sum_block)
    nf4_sum_scales_kernel(const float* __restrict__ absmax, double* __restrict__ sums,
                          std::int64_t block_count) {
  const std::int64_t groups = nf4_nested_block_count(block_count);
  for (std::int64_t group = std::int64_t{blockIdx.x} * threads_per_sum_block + threadIdx.x;
       group < groups; group += std::int64_t{gridDim.x} * threads_per_sum_block) {
    const std::int64_t begin = group * nf4_blocks_per_nested_block;
    const int count = static_cast<int>(block_count - begin < nf4_blocks_per_nested_block
                                           ? block_count - begin
                                           : nf4_blocks_per_nested_block);
    double sum = 0.0;
#pragma unroll 16
    for (int i = 0; i < count; ++i) sum += static_cast<double>(absmax[begin + i]);
    sums[group] = sum;
  }
}

/// offset = (sums[0] + sums[1] + ...) / block_count, rounded once to fp32; 0 for no blocks.
///
///   one warp: a lane loads a sum, and all lanes add all sums in index order, by shuffles
static __global__ void __launch_bounds__(lanes_per_warp)
    nf4_mean_of_scales_kernel(const double* sums, std::int64_t block_count, float* offset) {
  const int lane = static_cast<int>(threadIdx.x);
  const std::int64_t groups = nf4_nested_block_count(block_count);
  // A sum of no blocks is +0.0, which changes no bit of a total of magnitudes.
  const auto load = [&](std::int64_t group) { return group < groups ? sums[group] : 0.0; };

  double total = 0.0;
  double next = load(lane);
  for (std::int64_t first = 0; first < groups; first += lanes_per_warp) {
    const double current = next;
    next = load(first + lanes_per_warp + lane);
#pragma unroll
    for (int i = 0; i < lanes_per_warp; ++i) total += __shfl_sync(all_lanes, current, i);
  }
  if (lane == 0) {
    *offset = block_count > 0 ? static_cast<float>(total / static_cast<double>(block_count)) : 0.0f;
  }
}

/// nested_absmax[g] = max |absmax[b] - offset| over the 256 blocks of group g;
/// q[b] = the entry of the signed dynamic map nearest to (absmax[b] - offset) / nested_absmax[g].
///
///   absmax fp32 [block_count], q uint8 [block_count], nested_absmax fp32 [ceil(block_count / 256)]
///   a thread block owns a group, a thread a scale; shared: fp32 [warps_per_scale_block]
static __global__ void __launch_bounds__(threads_per_scale_block)
    nf4_quantize_scales_kernel(const float* absmax, const float* offset, std::uint8_t* q,
                               float* nested_absmax, std::int64_t block_count) {
  const Shared<float> maximum_of_warp = dynamic_shared_memory<float>();
  const int thread = static_cast<int>(threadIdx.x);
  const std::int64_t groups = nf4_nested_block_count(block_count);
  for (std::int64_t group = blockIdx.x; group < groups; group += gridDim.x) {
    const std::int64_t block = group * nf4_blocks_per_nested_block + thread;
    const float difference = block < block_count ? absmax[block] - *offset : 0.0f;

    float maximum = fabsf(difference);
#pragma unroll
    for (int distance = 1; distance < lanes_per_warp; distance *= 2) {
      maximum = fmaxf(maximum, __shfl_xor_sync(all_lanes, maximum, distance));
    }
    if (thread % lanes_per_warp == 0) maximum_of_warp.store(thread / lanes_per_warp, maximum);
    __syncthreads();
#pragma unroll
    for (int warp = 0; warp < warps_per_scale_block; ++warp)
      maximum = fmaxf(maximum, maximum_of_warp.load(warp));
    __syncthreads();  // all have read before the next group writes

    if (block < block_count) {
      q[block] = maximum > 0.0f ? device_signed_map.encode(BlockNormalizer(maximum)(difference))
                                : dynamic_map_signed_zero_code;
    }
    if (thread == 0) nested_absmax[group] = maximum;
  }
}

}  // namespace qlora::cuda
