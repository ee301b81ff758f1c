// The kernels of the optimisers with 8-bit block-wise state. optimizer.cu launches them; host tests
// run their bodies.
//
//   blocks of 256 elements are decoded, stepped as in optimizer.cuh, and encoded again; the bits
//   are those of cpu/scalar/optimizer.cpp
//
//   param, grad: fp32, bf16 or fp16, each its own; moments: uint8 codes; absmax: fp32
//   a thread block takes chunks in turn (optimizer_chunks.h), a warp owns a block, a lane two quads
//   of it
//   shared: a table for each moment, 19 KB for two, copied once by each thread block: the grid is
//   what the GPU holds at once
//
//                       bytes an element           instructions, of which an H200 has room for 7 a
//                  fp32    16-bit param and grad   byte at its memory's speed
//     AdamW          16            10              105
//     Lion           14             8              61
//     with stochastic rounding                     125, 74
//
// A code costs one look-up either way (format/dynamic_map_table.h), at random, so that lanes meet in
// banks. Where parameters and gradients have 16 bits it is instructions that bound the kernels.
#pragma once

#include <cstddef>
#include <limits>

#include "cuda/optimizer.cuh"
#include "cuda/shared_memory.cuh"
#include "format/dynamic_map_table.h"

namespace qlora::cuda {

// AdamW: 80 registers a thread, and 57 KB of shared memory. Lion: 64, or 80 with random numbers.
// With one more the registers do not suffice.
template <typename Rule, bool is_stochastic>
inline constexpr int optimizer8bit_thread_blocks_per_multiprocessor =
    Rule::moment_count == 2 || is_stochastic ? 3 : 4;

struct alignas(64) MomentTables {
  SignedDynamicMapTable first = make_signed_dynamic_map_table();
  UnsignedDynamicMapTable second = make_unsigned_dynamic_map_table();
};
static __device__ const MomentTables device_moment_tables = {};

/// What a rule needs of them.
template <typename Rule>
inline constexpr int moment_tables_bytes = static_cast<int>(
    Rule::moment_count == 2 ? sizeof(MomentTables) : offsetof(MomentTables, second));
static_assert(offsetof(MomentTables, second) % 16 == 0 && sizeof(MomentTables) % 16 == 0);

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

/// MomentTables in shared memory. A rule of one moment has the first table alone there.
class SharedMomentTables {
 public:
  __device__ explicit SharedMomentTables(Shared<unsigned char> tables)
      : first_(tables + static_cast<int>(offsetof(MomentTables, first))),
        second_(tables + static_cast<int>(offsetof(MomentTables, second))) {}

  /// Moment `j` in units of its block's absmax.
  __device__ float decode(int j, std::uint32_t code) const {
    return j == 0 ? first_.decode(code) : second_.decode(code);
  }

  /// The code of moment `j`, from it and from it in units of its block's absmax.
  __device__ std::uint32_t encode(int j, float moment, float unit) const {
    return j == 0 ? encode_first(unit) : encode_second(moment, unit);
  }

 private:
  __device__ std::uint32_t encode_first(float unit) const {
    const std::uint32_t bits = std::bit_cast<std::uint32_t>(unit);
    const std::uint32_t code = first_.encode(bits << 1 | bits >> 31);
    if (bits >> 31 == 0) return code;
    constexpr std::uint32_t mirror = 2 * dynamic_map_signed_zero_code;
    return code < mirror ? mirror - code : 0;
  }

  __device__ std::uint32_t encode_second(float moment, float unit) const {
    return moment == 0.0f ? std::uint32_t{dynamic_map_unsigned_zero_code}
                          : second_.encode(std::bit_cast<std::uint32_t>(unit) << 1);
  }

  MomentTable<SignedDynamicMapTable> first_;
  MomentTable<UnsignedDynamicMapTable> second_;
};

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
/// `rounding`: of the tensor.
template <bool is_whole, bool is_stochastic, typename Rule>
__device__ void step_block(const DeviceRule<Rule>& rule, const RoundingStream& rounding,
                           const OptimizerEntry& tensor, std::int64_t block, int lane,
                           const SharedMomentTables& tables) {
  constexpr int moment_count = Rule::moment_count;
  constexpr int block_size = static_cast<int>(state_block_size);
  const std::int64_t begin = block * block_size;
  void* const params = element_address(tensor.param_kind, tensor.param, begin);
  const void* const grads = element_address(tensor.grad_kind, tensor.grad, begin);
  std::uint8_t* moments[moment_count];
#pragma unroll
  for (int j = 0; j < moment_count; ++j) {
    moments[j] = static_cast<std::uint8_t*>(tensor.moments[j]) + begin;
  }
  const int count = is_whole ? block_size : elements_left(tensor.count, begin, block_size);
  QuadPlace at[quads_per_lane];
  RawQuad param[quads_per_lane], grad[quads_per_lane];
  std::uint32_t codes[moment_count][quads_per_lane];
#pragma unroll
  for (int q = 0; q < quads_per_lane; ++q) {
    at[q] = place_of(quad_of_lane(q, lane), count, is_whole, tensor.is_aligned);
    param[q] = load_quad(tensor.param_kind, params, at[q]);
    grad[q] = load_quad(tensor.grad_kind, grads, at[q]);
#pragma unroll
    for (int j = 0; j < moment_count; ++j) codes[j][q] = load_codes(moments[j], at[q]);
  }
  float old_absmax[moment_count];
#pragma unroll
  for (int j = 0; j < moment_count; ++j) old_absmax[j] = tensor.absmaxes[j][block];

  const bool rounds_at_random = is_stochastic && tensor.param_kind == FloatKind::bfloat16;
  RandomQuad random[quads_per_lane]{};
  if (rounds_at_random) random_quads(stream_from(rounding, begin), lane, random);

  Quad m[moment_count][quads_per_lane];
#pragma unroll
  for (int q = 0; q < quads_per_lane; ++q) {
    Quad p = widen(tensor.param_kind, param[q]);
    const Quad g = widen(tensor.grad_kind, grad[q]);
#pragma unroll
    for (int j = 0; j < moment_count; ++j) {
#pragma unroll
      for (int i = 0; i < elements_per_quad; ++i) {
        m[j][q].values[i] = tables.decode(j, codes[j][q] >> (8 * i) & 0xff) * old_absmax[j];
      }
    }
    step_quad(rule, p, g, m, q);
    if (rounds_at_random) {
      store_quad_stochastically(params, at[q], p, random[q]);
    } else {
      store_quad(tensor.param_kind, params, at[q], p);
    }
  }

  float absmax[moment_count];
#pragma unroll
  for (int j = 0; j < moment_count; ++j) absmax[j] = absolute_maximum(m[j], at, is_whole);
#pragma unroll
  for (int j = 0; j < moment_count; ++j) {
    Quad unit[quads_per_lane];
    normalize(absmax[j], m[j], unit);
#pragma unroll
    for (int q = 0; q < quads_per_lane; ++q) {
      std::uint32_t word = 0;
#pragma unroll
      for (int i = 0; i < elements_per_quad; ++i) {
        word |= tables.encode(j, m[j][q].values[i], unit[q].values[i]) << (8 * i);
      }
      store_codes(moments[j], at[q], word);
    }
    if (lane == 0) tensor.absmaxes[j][block] = absmax[j];
  }
}

template <typename Rule, bool is_stochastic>
static __global__ void __launch_bounds__(
    optimizer_threads, optimizer8bit_thread_blocks_per_multiprocessor<Rule, is_stochastic>)
    optimizer8bit_kernel(const __grid_constant__ OptimizerArguments<Rule> a) {
  if (is_skipped(a.found_inf)) return;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % lanes_per_warp, warp = warp_index(thread);
  const Shared<Bytes16> memory = dynamic_shared_memory<Bytes16>();
  constexpr int table_accesses = moment_tables_bytes<Rule> / 16;
#pragma unroll
  for (int first = 0; first < table_accesses; first += optimizer_threads) {
    const auto* const source = reinterpret_cast<const Bytes16*>(&device_moment_tables);
    const int i = first + thread;
    if (i < table_accesses) memory.store(i, load_16_bytes(source + i));
  }
  __syncthreads();
  const SharedMomentTables tables(memory.as<unsigned char>());

  for (std::uint32_t chunk = blockIdx.x; chunk < a.chunks.chunk_count(); chunk += gridDim.x) {
    const int index = a.chunks.tensor_of(chunk);
    const OptimizerEntry& tensor = a.tensors[index];
    const TensorRule<Rule> numbers = rule_of(a, index);
    const DeviceRule<Rule> rule(numbers.rule);
    const RoundingStream rounding{a.rounding_seed, tensor.first_counter, numbers.step};
    const std::int64_t first_block = a.chunks.first_element(index, chunk) / state_block_size;
    const std::int64_t whole_blocks = tensor.is_aligned ? tensor.count / state_block_size : 0;
    const std::int64_t blocks = ceil_divide(tensor.count, state_block_size);
#pragma unroll 1
    for (int i = warp; i < blocks_per_chunk; i += optimizer_warps) {
      const std::int64_t block = first_block + i;
      if (block < whole_blocks) {
        step_block<true, is_stochastic>(rule, rounding, tensor, block, lane, tables);
      } else if (block < blocks) {
        step_block<false, is_stochastic>(rule, rounding, tensor, block, lane, tables);
      }
    }
  }
}

}  // namespace qlora::cuda
