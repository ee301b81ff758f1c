// The kernels of the optimisers with 32-bit state, and those that read a step's numbers on the
// device. optimizer.cu launches them; host tests run their bodies.
//
//   a rule (core/adamw_rule.h, core/lion_rule.h) on every element of a list of tensors, in fp32,
//   with one rounding of the parameter; the bits are those of cpu/scalar/optimizer.cpp
//
//   param, grad: fp32, bf16 or fp16, each its own; moments: fp32
//   a thread block owns a chunk of 4096 elements (optimizer_chunks.h), a thread 4 quads of it
//   no shared memory
//
//                       bytes an element           instructions, of which an H200 has room for 7 a
//                  fp32    16-bit param and grad   byte at its memory's speed
//     AdamW          28            22              55, half of them divisions and a root
//     Lion           20            14              27
//     both, with stochastic rounding               27 more
//
// A thread has a quad on its way, 32 to 64 bytes: 40 KB or more for the threads of an SM, where
// HBM's latency wants some 30.
#pragma once

#include "cuda/optimizer_rounding.cuh"
#include "cuda/optimizer_rules.cuh"
#include "cuda/quad.cuh"

namespace qlora::cuda {

// 64 registers a thread; Lion, of which a thread reads less, gets more threads of 48.
template <typename Rule>
inline constexpr int optimizer_thread_blocks_per_multiprocessor = Rule::moment_count == 2 ? 4 : 5;

inline constexpr int rule_threads = 64;

/// How many of at most `limit` elements a tensor of `count` has from `begin` on.
__device__ inline int elements_left(std::int64_t count, std::int64_t begin, int limit) {
  return static_cast<int>(count - begin < limit ? count - begin : limit);
}

__device__ inline QuadPlace place_of(int first, int count, bool is_whole, bool is_aligned) {
  return {first, count, is_whole || (is_aligned && first + elements_per_quad <= count)};
}

__device__ inline bool is_skipped(const float* found_inf) {
  return found_inf != nullptr && *found_inf != 0.0f;
}

/// rules[i] of tensor i's step count, learning rate and gradient scale; step_counts[i] += 1 where
/// counts_step[i]. Neither, if found_inf. A thread owns a tensor.
///
/// Rules are made here once, in fp64, and not by each thread block of the kernels that follow: many
/// GPUs do fp64 at 1/64 of fp32's rate. And the counts are written when nobody reads them any more.
template <typename Rule>
static __global__ void __launch_bounds__(rule_threads)
    optimizer_rules_kernel(const __grid_constant__ OptimizerRuleArguments<Rule> a) {
  if (is_skipped(a.found_inf)) return;
  const int tensor = static_cast<int>(blockIdx.x) * rule_threads + static_cast<int>(threadIdx.x);
  if (tensor >= a.tensor_count) return;
  OptimizerNumbers numbers = a.numbers;
  if (a.lr != nullptr) numbers.lr = static_cast<double>(*a.lr);
  if (float* const step_count = a.step_counts[tensor]; step_count != nullptr) {
    numbers.step = static_cast<std::int64_t>(*step_count) + 1;
    if (a.counts_step[tensor]) *step_count += 1.0f;
  }
  a.rules[tensor] = TensorRule<Rule>(numbers, a.grad_scale != nullptr ? *a.grad_scale : 1.0f);
}

template <typename Rule>
__device__ TensorRule<Rule> rule_of(const OptimizerArguments<Rule>& a, int tensor) {
  if (a.rules != nullptr) return a.rules[tensor];
  return a.rule;
}

/// `is_whole`: the chunk is not short, and its tensor is aligned. `rounding`: of the tensor.
template <bool is_whole, bool is_stochastic, typename Rule>
__device__ void step_chunk(const DeviceRule<Rule>& rule, const RoundingStream& rounding,
                           const OptimizerEntry& tensor, std::int64_t begin, int thread) {
  constexpr int moment_count = Rule::moment_count;
  void* const params = element_address(tensor.param_kind, tensor.param, begin);
  const void* const grads = element_address(tensor.grad_kind, tensor.grad, begin);
  void* moments[moment_count];
#pragma unroll
  for (int j = 0; j < moment_count; ++j) {
    moments[j] = element_address(FloatKind::float32, tensor.moments[j], begin);
  }
  const int count =
      is_whole ? elements_per_chunk : elements_left(tensor.count, begin, elements_per_chunk);
#pragma unroll 1  // unrolled it takes more registers, and fewer threads fit
  for (int step = 0; step < quads_per_thread; ++step) {
    const QuadPlace at = place_of(quad_of_thread(step, thread), count, is_whole, tensor.is_aligned);
    const RawQuad param = load_quad(tensor.param_kind, params, at);
    const RawQuad grad = load_quad(tensor.grad_kind, grads, at);
    Quad m[moment_count][1];
#pragma unroll
    for (int j = 0; j < moment_count; ++j) {
      m[j][0] = widen(FloatKind::float32, load_quad(FloatKind::float32, moments[j], at));
    }
    Quad p = widen(tensor.param_kind, param);
    step_quad(rule, p, widen(tensor.grad_kind, grad), m, 0);
    if (is_stochastic && tensor.param_kind == FloatKind::bfloat16) {
      store_quad_stochastically(params, at, p, random_quad(stream_from(rounding, begin), at.first));
    } else {
      store_quad(tensor.param_kind, params, at, p);
    }
#pragma unroll
    for (int j = 0; j < moment_count; ++j) {
      store_quad(FloatKind::float32, moments[j], at, m[j][0]);
    }
  }
}

template <typename Rule, bool is_stochastic>
static __global__ void __launch_bounds__(optimizer_threads,
                                         optimizer_thread_blocks_per_multiprocessor<Rule>)
    optimizer_kernel(const __grid_constant__ OptimizerArguments<Rule> a) {
  if (is_skipped(a.found_inf)) return;
  const int thread = static_cast<int>(threadIdx.x);
  for (std::uint32_t chunk = blockIdx.x; chunk < a.chunks.chunk_count(); chunk += gridDim.x) {
    const int index = a.chunks.tensor_of(chunk);
    const OptimizerEntry& tensor = a.tensors[index];
    const TensorRule<Rule> numbers = rule_of(a, index);
    const DeviceRule<Rule> rule(numbers.rule);
    const RoundingStream rounding{a.rounding_seed, tensor.first_counter, numbers.step};
    const std::int64_t begin = a.chunks.first_element(index, chunk);
    if (tensor.is_aligned && begin + elements_per_chunk <= tensor.count) {
      step_chunk<true, is_stochastic>(rule, rounding, tensor, begin, thread);
    } else {
      step_chunk<false, is_stochastic>(rule, rounding, tensor, begin, thread);
    }
  }
}

}  // namespace qlora::cuda
