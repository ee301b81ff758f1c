// A product with an NF4 weight, in either direction, as the kernels' launchers take it.
#pragma once

#include "core/operations.h"

namespace qlora::cuda {

enum class Direction {
  forward,     // y[m,n]  = x[m,k]  · Wᵀ + bias[n]
  grad_input,  // dx[m,k] = dy[m,n] · W
};

/// The operation that messages name.
constexpr const char* operation_of(Direction direction) {
  return direction == Direction::forward ? "nf4_linear" : "nf4_linear_grad_input";
}

/// Validated arguments (core/operations.cpp). forward: input is x, output is y; grad_input: input is
/// dy, output is dx, and there is no bias.
struct NF4Matmul {
  Direction direction;
  TensorView input, output;
  NF4Weight weight;
  TensorView bias;

  std::int64_t m() const { return input.shape[0]; }
  /// The length of the sums, and the columns of the output.
  std::int64_t reduced() const { return direction == Direction::forward ? weight.k : weight.n; }
  std::int64_t columns() const { return direction == Direction::forward ? weight.n : weight.k; }
};

}  // namespace qlora::cuda
