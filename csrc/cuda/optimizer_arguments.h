// What the optimisers' kernels are given: a list of tensors, by value in the kernel's parameters, so
// that nothing is copied to the device first and a captured CUDA graph holds all of it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/adamw_rule.h"
#include "core/lion_rule.h"
#include "cuda/optimizer_chunks.h"

namespace qlora::cuda {

/// Of all rules. One that has fewer leaves the last ones out.
inline constexpr int max_moment_count = 2;

enum class FloatKind : std::uint8_t { float32, bfloat16, float16 };

/// A parameter with its gradient and its state, or a piece of it.
struct OptimizerEntry {
  void* param;
  const void* grad;
  void* moments[max_moment_count];    // fp32, or uint8 codes
  float* absmaxes[max_moment_count];  // 8-bit state only
  std::uint64_t first_counter;        // of RoundingStream
  std::int64_t count : 47;            // ChunkTable takes up to 2^43
  bool is_aligned : 1;                // a quad is one access in each of the tensors
  FloatKind param_kind : 8, grad_kind : 8;
};
static_assert(sizeof(OptimizerEntry) == 64);

/// What the numbers of a step come to for a tensor.
template <typename Rule>
struct TensorRule {
  Rule rule;
  std::uint32_t step;  // of RoundingStream

  QLORA_HOST_DEVICE explicit TensorRule(const OptimizerNumbers& numbers, float grad_scale = 1.0f)
      : rule(numbers, grad_scale), step(static_cast<std::uint32_t>(numbers.step)) {}
};

/// Of the kernels that step parameters.
template <typename Rule>
struct OptimizerArguments {
  TensorRule<Rule> rule;          // for all tensors, where there are no rules
  const TensorRule<Rule>* rules;  // null, or one for each tensor
  const float* found_inf;         // null, or: not zero means that nothing is to be done
  std::uint64_t rounding_seed;    // of the kernels that round stochastically
  ChunkTable chunks;
  OptimizerEntry tensors[tensors_per_launch];
};

/// Of the kernel that makes rules from the numbers that are in the device's memory.
template <typename Rule>
struct OptimizerRuleArguments {
  TensorRule<Rule>* rules;
  OptimizerNumbers numbers;
  const float* lr;          // null: numbers.lr
  const float* grad_scale;  // null: 1
  const float* found_inf;   // as in OptimizerArguments
  int tensor_count;
  float* step_counts[tensors_per_launch];  // null: numbers.step
  bool counts_step[tensors_per_launch];    // whether the step count goes up
};

// Since CUDA 12.1 (driver 530) and compute capability 7.0; 4 KB before.
inline constexpr std::size_t max_parameter_bytes = 32764;
static_assert(sizeof(OptimizerArguments<AdamWRule>) <= max_parameter_bytes);
static_assert(sizeof(OptimizerArguments<LionRule>) <= max_parameter_bytes);
static_assert(sizeof(OptimizerRuleArguments<AdamWRule>) <= max_parameter_bytes);
static_assert(sizeof(OptimizerRuleArguments<LionRule>) <= max_parameter_bytes);

}  // namespace qlora::cuda
