// The kernel of AdamW with 32-bit state, and the one that reads a step's numbers on the device.
// optimizer.cu launches them; host tests run their bodies.
//
//   core/adamw_rule.h on every element of a list of tensors, in fp32, with one rounding of the
//   parameter; the bits are those of cpu/scalar/optimizer.cpp
//
//   param, grad: fp32, bf16 or fp16, each its own; exp_avg, exp_avg_sq: fp32
//   a thread block owns a chunk of 4096 elements (optimizer_chunks.h), a thread 4 quads of it
//   28 bytes an element in fp32, 22 with a 16-bit parameter and gradient; no shared memory
//
// A thread has a quad on its way, 48 to 64 bytes: 48 KB or more for the 1024 threads of an SM, where
// HBM's latency wants some 30. The two divisions and the root, which are IEEE's, are half of the 60
// instructions that an element takes; at HBM's speed an H200 has room for 150.
#pragma once

#include "cuda/optimizer_rules.cuh"
#include "cuda/quad.cuh"

namespace qlora::cuda {

// 64 registers a thread.
inline constexpr int optimizer_thread_blocks_per_multiprocessor = 4;

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

/// rules[i] of tensor i's step count, learning rate and gradient scale; step_counts[i] += 1. Neither,
/// if found_inf. A thread owns a tensor.
///
/// Rules are made here once, in fp64, and not by each thread block of the kernels that follow: many
/// GPUs do fp64 at 1/64 of fp32's rate. And the counts are written when nobody reads them any more.
static __global__ void __launch_bounds__(rule_threads)
    optimizer_rules_kernel(const __grid_constant__ OptimizerRuleArguments a) {
  if (is_skipped(a.found_inf)) return;
  const int tensor = static_cast<int>(blockIdx.x) * rule_threads + static_cast<int>(threadIdx.x);
  if (tensor >= a.tensor_count) return;
  OptimizerNumbers numbers = a.numbers;
  if (a.lr != nullptr) numbers.lr = static_cast<double>(*a.lr);
  if (float* const step_count = a.step_counts[tensor]; step_count != nullptr) {
    numbers.step = static_cast<std::int64_t>(*step_count) + 1;
    *step_count += 1.0f;
  }
  a.rules[tensor] = AdamWRule(numbers, a.grad_scale != nullptr ? *a.grad_scale : 1.0f);
}

__device__ inline AdamWDeviceRule rule_of(const OptimizerArguments& a, int tensor) {
  if (a.rules != nullptr) return AdamWDeviceRule(a.rules[tensor]);
  return AdamWDeviceRule(a.rule);
}

/// `is_whole`: the chunk is not short, and its tensor is aligned.
template <bool is_whole>
__device__ void step_chunk(const AdamWDeviceRule& rule, const OptimizerEntry& tensor,
                           std::int64_t begin, int thread) {
  void* const params = element_address(tensor.param_kind, tensor.param, begin);
  const void* const grads = element_address(tensor.grad_kind, tensor.grad, begin);
  void* const exp_avgs = element_address(FloatKind::float32, tensor.exp_avg, begin);
  void* const exp_avg_sqs = element_address(FloatKind::float32, tensor.exp_avg_sq, begin);
  const int count =
      is_whole ? elements_per_chunk : elements_left(tensor.count, begin, elements_per_chunk);
#pragma unroll 1  // unrolled it takes more registers, and fewer threads fit
  for (int step = 0; step < quads_per_thread; ++step) {
    const QuadPlace at = place_of(quad_of_thread(step, thread), count, is_whole, tensor.is_aligned);
    const RawQuad param = load_quad(tensor.param_kind, params, at);
    const RawQuad grad = load_quad(tensor.grad_kind, grads, at);
    const RawQuad exp_avg = load_quad(FloatKind::float32, exp_avgs, at);
    const RawQuad exp_avg_sq = load_quad(FloatKind::float32, exp_avg_sqs, at);
    Quad p = widen(tensor.param_kind, param);
    const Quad g = widen(tensor.grad_kind, grad);
    Quad m = widen(FloatKind::float32, exp_avg);
    Quad v = widen(FloatKind::float32, exp_avg_sq);
#pragma unroll
    for (int i = 0; i < elements_per_quad; ++i) {
      rule(p.values[i], g.values[i], m.values[i], v.values[i]);
    }
    store_quad(tensor.param_kind, params, at, p);
    store_quad(FloatKind::float32, exp_avgs, at, m);
    store_quad(FloatKind::float32, exp_avg_sqs, at, v);
  }
}

static __global__ void __launch_bounds__(optimizer_threads,
                                         optimizer_thread_blocks_per_multiprocessor)
    optimizer_kernel(const __grid_constant__ OptimizerArguments a) {
  if (is_skipped(a.found_inf)) return;
  const int thread = static_cast<int>(threadIdx.x);
  for (std::uint32_t chunk = blockIdx.x; chunk < a.chunks.chunk_count(); chunk += gridDim.x) {
    const int index = a.chunks.tensor_of(chunk);
    const OptimizerEntry& tensor = a.tensors[index];
    const AdamWDeviceRule rule = rule_of(a, index);
    const std::int64_t begin = a.chunks.first_element(index, chunk);
    if (tensor.is_aligned && begin + elements_per_chunk <= tensor.count) {
      step_chunk<true>(rule, tensor, begin, thread);
    } else {
      step_chunk<false>(rule, tensor, begin, thread);
    }
  }
}

}  // namespace qlora::cuda
