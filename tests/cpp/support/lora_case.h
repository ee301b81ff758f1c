// Calls of lora_forward and lora_backward with random tensors, and their results against fp64: for
// the tests of every backend.
#pragma once

#include "core/operations.h"
#include "support/host_tensor.h"

struct LoRAShape {
  std::int64_t m, n, k, r;
};

inline std::ostream& operator<<(std::ostream& stream, const LoRAShape& shape) {
  return stream << "m=" << shape.m << " n=" << shape.n << " k=" << shape.k << " r=" << shape.r;
}

inline constexpr float lora_scaling = 0.7f;

struct LoRAForwardCase {
  HostTensor x, lora_a, lora_b, t, y;
  reference::Matrix y_before;

  LoRAForwardCase(qlora::DType dtype, qlora::DType factor_dtype, const LoRAShape& shape,
                  Generator& generator);
  qlora::LoRAForward arguments();
  /// t and y are what the call makes of the other tensors.
  void expect_right() const;
};

struct LoRABackwardCase {
  HostTensor dy, x, t, lora_a, lora_b, grad_a, grad_b, dx;
  reference::Matrix dx_before;

  LoRABackwardCase(qlora::DType dtype, qlora::DType factor_dtype, const LoRAShape& shape,
                   Generator& generator);
  qlora::LoRABackward arguments();
  void expect_right() const;
};
