// The kernel of AdamW with 8-bit block-wise state. optimizer.cu launches it; host tests run its body.
//
//   blocks of 256 elements are decoded, stepped as in optimizer.cuh, and encoded again; the bits are
//   those of cpu/scalar/optimizer.cpp
//
//   param, grad: fp32, bf16 or fp16, each its own; exp_avg, exp_avg_sq: uint8 codes; absmax: fp32
//   a thread block takes chunks in turn (optimizer_chunks.h), a warp owns a block, a lane two quads of it
//   16 bytes an element in fp32, 10 with a 16-bit parameter and gradient
//   shared: 19 KB of tables, copied once by each thread block: the grid is what the GPU holds at once
//
// A code costs one look-up either way (format/dynamic_map_table.h), at random, so that lanes meet in
// banks. An element takes some 105 instructions; at HBM's speed an H200 has room for 110 where it has
// 16 bytes, and for 70 where it has 10: there it is instructions that bound the kernel.
#pragma once

#include <cstddef>
#include <limits>

#include "cuda/optimizer.cuh"
#include "cuda/shared_memory.cuh"
#include "format/dynamic_map_table.h"

namespace qlora::cuda {

// 80 registers a thread, and 57 KB of shared memory. With 4 the registers do not suffice.
inline constexpr int optimizer8bit_thread_blocks_per_multiprocessor = 3;

struct alignas(64) MomentTables {
  SignedDynamicMapTable exp_avg = make_signed_dynamic_map_table();
  UnsignedDynamicMapTable exp_avg_sq = make_unsigned_dynamic_map_table();
};
static __device__ const MomentTables device_moment_tables = {};

inline constexpr int optimizer8bit_shared_bytes = static_cast<int>(sizeof(MomentTables));
static_assert(optimizer8bit_shared_bytes % 16 == 0);

/// A table in shared memory.
template <typename Table>
class MomentTable {
 public:
  __device__ explicit MomentTable(Shared<unsigned char> table)
      : values_(table.as<float>()),
        entries_(
            (table + static_cast<int>(offsetof(Table, entries))).template as<std::uint32_t>()) {
    static_assert(offsetof(Table, values) == 0);
  }

  __device__ float decode(std::uint32_t code) const { return values_.load(static_cast<int>(code)); }

  /// The code of a magnitude in units of the block's absmax, from its key.
  __device__ std::uint32_t encode(std::uint32_t key) const {
    constexpr std::uint32_t first = dynamic_map_first_key_word << 16;
    constexpr std::uint32_t last = dynamic_map_last_key_word << 16 | 0xffff;
    const std::uint32_t from_first = (key > first ? key : first) - first;
    const std::uint32_t limited = from_first < last ? from_first : last;  // NaN is beyond
    const std::uint32_t entry = entries_.load(static_cast<int>(limited >> Table::shift));
    return (entry + limited) >> Table::shift;
  }

 private:
  Shared<float> values_;
  Shared<std::uint32_t> entries_;
};

using FirstMomentTable = MomentTable<SignedDynamicMapTable>;
using SecondMomentTable = MomentTable<UnsignedDynamicMapTable>;

/// The code of a first moment in units of its block's absmax.
__device__ inline std::uint32_t encode_first_moment(const FirstMomentTable& table, float x) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(x);
  const std::uint32_t code = table.encode(bits << 1 | bits >> 31);
  if (bits >> 31 == 0) return code;
  constexpr std::uint32_t mirror = 2 * dynamic_map_signed_zero_code;
  return code < mirror ? mirror - code : 0;
}

/// The code of a second moment, from it and from it in units of its block's absmax.
__device__ inline std::uint32_t encode_second_moment(const SecondMomentTable& table, float moment,
                                                     float x) {
  return moment == 0.0f ? std::uint32_t{dynamic_map_unsigned_zero_code}
                        : table.encode(std::bit_cast<std::uint32_t>(x) << 1);
}

/// The moment in units of `absmax`, by BlockNormalizer's rule; zeros stay zeros where that is zero.
__device__ inline void normalize(float absmax, const Quad (&moment)[quads_per_lane],
                                 Quad (&out)[quads_per_lane]) {
  const float reciprocal = 1.0f / absmax;
  const bool multiplies = reciprocal <= std::numeric_limits<float>::max();
  const bool divides = !multiplies && absmax != 0.0f;
#pragma unroll
  for (int q = 0; q < quads_per_lane; ++q) {
#pragma unroll
    for (int i = 0; i < elements_per_quad; ++i) {
      out[q].values[i] = moment[q].values[i] * (multiplies ? reciprocal : 1.0f);
    }
  }
  if (!divides) return;  // subnormal, or NaN
#pragma unroll
  for (int q = 0; q < quads_per_lane; ++q) {
#pragma unroll
    for (int i = 0; i < elements_per_quad; ++i) out[q].values[i] /= absmax;
  }
}

/// The largest magnitude of the `count` elements of a warp's block, or NaN if there is one among them:
/// magnitudes are ordered as their bits are, with NaN above Inf.
__device__ inline float absolute_maximum(const Quad (&moment)[quads_per_lane],
                                         const QuadPlace (&at)[quads_per_lane], bool is_whole) {
  std::uint32_t maximum = 0;
#pragma unroll
  for (int q = 0; q < quads_per_lane; ++q) {
#pragma unroll
    for (int i = 0; i < elements_per_quad; ++i) {
      const std::uint32_t magnitude =
          std::bit_cast<std::uint32_t>(moment[q].values[i]) & 0x7fffffffu;
      if ((is_whole || at[q].has(i)) && magnitude > maximum) maximum = magnitude;
    }
  }
  return std::bit_cast<float>(max_of_warp(maximum));
}

/// One block of a tensor, by a warp. `is_whole`: it is not short, and its tensor is aligned.
template <bool is_whole>
__device__ void step_block(const AdamWDeviceRule& rule, const OptimizerEntry& tensor,
                           std::int64_t block, int lane, const FirstMomentTable& first_table,
                           const SecondMomentTable& second_table) {
  constexpr int block_size = static_cast<int>(state_block_size);
  const std::int64_t begin = block * block_size;
  void* const params = element_address(tensor.param_kind, tensor.param, begin);
  const void* const grads = element_address(tensor.grad_kind, tensor.grad, begin);
  auto* const exp_avgs = static_cast<std::uint8_t*>(tensor.exp_avg) + begin;
  auto* const exp_avg_sqs = static_cast<std::uint8_t*>(tensor.exp_avg_sq) + begin;
  const int count = is_whole ? block_size : elements_left(tensor.count, begin, block_size);
  QuadPlace at[quads_per_lane];
  RawQuad param[quads_per_lane], grad[quads_per_lane];
  std::uint32_t codes[quads_per_lane], codes_sq[quads_per_lane];
#pragma unroll
  for (int q = 0; q < quads_per_lane; ++q) {
    at[q] = place_of(quad_of_lane(q, lane), count, is_whole, tensor.is_aligned);
    param[q] = load_quad(tensor.param_kind, params, at[q]);
    grad[q] = load_quad(tensor.grad_kind, grads, at[q]);
    codes[q] = load_codes(exp_avgs, at[q]);
    codes_sq[q] = load_codes(exp_avg_sqs, at[q]);
  }
  const float old_absmax = tensor.exp_avg_absmax[block];
  const float old_absmax_sq = tensor.exp_avg_sq_absmax[block];

  Quad m[quads_per_lane], v[quads_per_lane];
#pragma unroll
  for (int q = 0; q < quads_per_lane; ++q) {
    Quad p = widen(tensor.param_kind, param[q]);
    const Quad g = widen(tensor.grad_kind, grad[q]);
#pragma unroll
    for (int i = 0; i < elements_per_quad; ++i) {
      m[q].values[i] = first_table.decode(codes[q] >> (8 * i) & 0xff) * old_absmax;
      v[q].values[i] = second_table.decode(codes_sq[q] >> (8 * i) & 0xff) * old_absmax_sq;
      rule(p.values[i], g.values[i], m[q].values[i], v[q].values[i]);
    }
    store_quad(tensor.param_kind, params, at[q], p);
  }

  const float absmax = absolute_maximum(m, at, is_whole);
  const float absmax_sq = absolute_maximum(v, at, is_whole);
  Quad m_unit[quads_per_lane], v_unit[quads_per_lane];
  normalize(absmax, m, m_unit);
  normalize(absmax_sq, v, v_unit);
#pragma unroll
  for (int q = 0; q < quads_per_lane; ++q) {
    std::uint32_t word = 0, word_sq = 0;
#pragma unroll
    for (int i = 0; i < elements_per_quad; ++i) {
      word |= encode_first_moment(first_table, m_unit[q].values[i]) << (8 * i);
      word_sq |= encode_second_moment(second_table, v[q].values[i], v_unit[q].values[i]) << (8 * i);
    }
    store_codes(exp_avgs, at[q], word);
    store_codes(exp_avg_sqs, at[q], word_sq);
  }
  if (lane == 0) {
    tensor.exp_avg_absmax[block] = absmax;
    tensor.exp_avg_sq_absmax[block] = absmax_sq;
  }
}

static __global__ void __launch_bounds__(optimizer_threads,
                                         optimizer8bit_thread_blocks_per_multiprocessor)
    optimizer8bit_kernel(const __grid_constant__ OptimizerArguments a) {
  if (is_skipped(a.found_inf)) return;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % lanes_per_warp, warp = warp_index(thread);
  const Shared<Bytes16> tables = dynamic_shared_memory<Bytes16>();
  constexpr int table_accesses = optimizer8bit_shared_bytes / 16;
#pragma unroll
  for (int first = 0; first < table_accesses; first += optimizer_threads) {
    const auto* const source = reinterpret_cast<const Bytes16*>(&device_moment_tables);
    const int i = first + thread;
    if (i < table_accesses) tables.store(i, load_16_bytes(source + i));
  }
  __syncthreads();
  const Shared<unsigned char> bytes = tables.as<unsigned char>();
  const FirstMomentTable first_table(bytes + static_cast<int>(offsetof(MomentTables, exp_avg)));
  const SecondMomentTable second_table(bytes +
                                       static_cast<int>(offsetof(MomentTables, exp_avg_sq)));

  for (std::uint32_t chunk = blockIdx.x; chunk < a.chunks.chunk_count(); chunk += gridDim.x) {
    const int index = a.chunks.tensor_of(chunk);
    const OptimizerEntry& tensor = a.tensors[index];
    const AdamWDeviceRule rule = rule_of(a, index);
    const std::int64_t first_block = a.chunks.first_element(index, chunk) / state_block_size;
    const std::int64_t whole_blocks = tensor.is_aligned ? tensor.count / state_block_size : 0;
    const std::int64_t blocks = ceil_divide(tensor.count, state_block_size);
#pragma unroll 1
    for (int i = warp; i < blocks_per_chunk; i += optimizer_warps) {
      const std::int64_t block = first_block + i;
      if (block < whole_blocks) {
        step_block<true>(rule, tensor, block, lane, first_table, second_table);
      } else if (block < blocks) {
        step_block<false>(rule, tensor, block, lane, first_table, second_table);
      }
    }
  }
}

}  // namespace qlora::cuda
