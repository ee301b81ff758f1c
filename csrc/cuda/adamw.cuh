// The kernel of AdamW with 32-bit state, and the one that reads a step's numbers on the device.
// adamw.cu launches them; host tests run their bodies.
//
//   core/adamw_rule.h on every element of a list of tensors, in fp32, with one rounding of the
//   parameter; the bits are those of cpu/scalar/adamw.cpp
//
//   param, grad: fp32, bf16 or fp16, each its own; exp_avg, exp_avg_sq: fp32
//   a thread block owns a chunk of 4096 elements (adamw_chunks.h), a thread 4 quads of it
//   28 bytes an element in fp32, 22 with a 16-bit parameter and gradient; no shared memory
//
// A thread has two quads on their way, 64 bytes at least: half of an SM's threads hide the latency of
// HBM with them. The two divisions and the root are IEEE's, some 30 of the 70 instructions an
// element, where memory leaves an H200 room for 140.
#pragma once

#include "cuda/quad.cuh"

namespace qlora::cuda {

inline constexpr int quads_in_flight = 2;
static_assert(quads_per_thread % quads_in_flight == 0);

inline constexpr int rule_threads = 64;

__device__ inline bool is_skipped(const float* found_inf) {
  return found_inf != nullptr && *found_inf != 0.0f;
}

/// rules[i] of tensor i's step count, learning rate and gradient scale; step_counts[i] += 1. Neither,
/// if found_inf. A thread owns a tensor.
///
/// Rules are made here once, in fp64, and not by each thread block of the kernels that follow: many
/// GPUs do fp64 at 1/64 of fp32's rate. And the counts are written when nobody reads them any more.
static __global__ void __launch_bounds__(rule_threads)
    adamw_rules_kernel(const __grid_constant__ AdamWRuleArguments a) {
  if (is_skipped(a.found_inf)) return;
  const int tensor = static_cast<int>(blockIdx.x) * rule_threads + static_cast<int>(threadIdx.x);
  if (tensor >= a.tensor_count) return;
  AdamWNumbers numbers = a.numbers;
  if (a.lr != nullptr) numbers.lr = static_cast<double>(*a.lr);
  if (float* const step_count = a.step_counts[tensor]; step_count != nullptr) {
    numbers.step = static_cast<std::int64_t>(*step_count) + 1;
    *step_count += 1.0f;
  }
  a.rules[tensor] = AdamWRule(numbers, a.grad_scale != nullptr ? *a.grad_scale : 1.0f);
}

/// `is_whole`: the chunk is not short, and its tensor is aligned.
template <bool is_whole>
__device__ void step_chunk(const AdamWRule& rule, const AdamWEntry& tensor, std::int64_t begin,
                           int thread) {
#pragma unroll 1
  for (int step = 0; step < quads_per_thread; step += quads_in_flight) {
    std::int64_t first[quads_in_flight];
    bool is_vector[quads_in_flight];
    RawQuad param[quads_in_flight], grad[quads_in_flight];
    RawQuad exp_avg[quads_in_flight], exp_avg_sq[quads_in_flight];
#pragma unroll
    for (int q = 0; q < quads_in_flight; ++q) {
      first[q] = begin + quad_of_thread(step + q, thread);
      is_vector[q] =
          is_whole || (tensor.is_aligned && first[q] + elements_per_quad <= tensor.count);
      const auto load = [&](FloatKind kind, const void* from) {
        return load_quad(kind, from, first[q], tensor.count, is_vector[q]);
      };
      param[q] = load(tensor.param_kind, tensor.param);
      grad[q] = load(tensor.grad_kind, tensor.grad);
      exp_avg[q] = load(FloatKind::float32, tensor.exp_avg);
      exp_avg_sq[q] = load(FloatKind::float32, tensor.exp_avg_sq);
    }
#pragma unroll
    for (int q = 0; q < quads_in_flight; ++q) {
      Quad p = widen(tensor.param_kind, param[q]);
      const Quad g = widen(tensor.grad_kind, grad[q]);
      Quad m = widen(FloatKind::float32, exp_avg[q]);
      Quad v = widen(FloatKind::float32, exp_avg_sq[q]);
#pragma unroll
      for (int i = 0; i < elements_per_quad; ++i) {
        rule(p.values[i], g.values[i], m.values[i], v.values[i]);
      }
      const auto store = [&](FloatKind kind, void* to, const Quad& quad) {
        store_quad(kind, to, first[q], tensor.count, is_vector[q], quad);
      };
      store(tensor.param_kind, tensor.param, p);
      store(FloatKind::float32, tensor.exp_avg, m);
      store(FloatKind::float32, tensor.exp_avg_sq, v);
    }
  }
}

static __global__ void __launch_bounds__(adamw_threads)
    adamw_kernel(const __grid_constant__ AdamWArguments a) {
  if (is_skipped(a.found_inf)) return;
  for (std::uint32_t chunk = blockIdx.x; chunk < a.chunks.chunk_count(); chunk += gridDim.x) {
    const int index = a.chunks.tensor_of(chunk);
    const AdamWEntry& tensor = a.tensors[index];
    const AdamWRule rule = a.rules == nullptr ? a.rule : a.rules[index];
    const std::int64_t begin = a.chunks.first_element(index, chunk);
    const int thread = static_cast<int>(threadIdx.x);
    if (tensor.is_aligned && begin + elements_per_chunk <= tensor.count) {
      step_chunk<true>(rule, tensor, begin, thread);
    } else {
      step_chunk<false>(rule, tensor, begin, thread);
    }
  }
}

}  // namespace qlora::cuda
