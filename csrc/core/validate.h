// The checks that operations.cpp is made of. Each throws InvalidArgument naming the operation and
// the argument.
#pragma once

#include <limits>

#include "core/operations.h"
#include "format/nf4_layout.h"

namespace qlora {

constexpr bool is_float_dtype(DType dtype) {
  return dtype == DType::float32 || dtype == DType::bfloat16 || dtype == DType::float16;
}

/// Binds an operation's name and device, so that a check reads as the rule that it enforces.
class Validator {
 public:
  Validator(const char* operation, Device device) : operation_(operation), device_(device) {}

  /// `tensor` is there, contiguous, on the operation's device, and there aligned to its elements.
  void present(const TensorView& tensor, const char* argument) const {
    check(tensor.is_present, operation_, ": ", argument, " is missing");
    check(tensor.is_contiguous, operation_, ": ", argument, " of shape ", tensor.shape,
          " is not contiguous; pass ", argument, ".contiguous()");
    check(tensor.device == device_, operation_, ": ", argument, " is on ", tensor.device,
          ", but the other tensors are on ", device_);
    if (device_.type == DeviceType::cuda) aligned(tensor, argument);
  }

  void dtype(const TensorView& tensor, const char* argument, DType wanted) const {
    present(tensor, argument);
    check(tensor.dtype == wanted, operation_, ": ", argument, " is ", tensor.dtype, ", want ",
          wanted);
  }

  void float_dtype(const TensorView& tensor, const char* argument) const {
    present(tensor, argument);
    check(is_float_dtype(tensor.dtype), operation_, ": ", argument, " is ", tensor.dtype,
          ", want float32, bfloat16 or float16");
  }

  void shape(const TensorView& tensor, const char* argument, const Shape& wanted) const {
    check(tensor.shape == wanted, operation_, ": ", argument, " has shape ", tensor.shape,
          ", want ", wanted);
  }

  void rank(const TensorView& tensor, const char* argument, int wanted) const {
    check(tensor.shape.rank == wanted, operation_, ": ", argument, " has shape ", tensor.shape,
          ", want ", wanted, " dimensions");
  }

  void numel(const TensorView& tensor, const char* argument, std::int64_t wanted) const {
    check(tensor.numel() == wanted, operation_, ": ", argument, " of shape ", tensor.shape, " has ",
          tensor.numel(), " elements, want ", wanted);
  }

  /// The stored tensors of a weight [n, k] have the dtypes and sizes that the format asks for.
  void weight(const NF4Weight& weight) const {
    check(is_nf4_block_size(weight.block_size), operation_, ": block_size is ", weight.block_size,
          ", want a power of two from ", nf4_min_block_size, " to ", nf4_max_block_size);
    check(weight.n >= 0 && weight.k >= 0, operation_, ": the weight has shape [", weight.n, ", ",
          weight.k, "], want sizes of at least 0");
    check(weight.k == 0 || weight.n <= max_elements / weight.k, operation_,
          ": the weight has shape [", weight.n, ", ", weight.k, "], want at most ", max_elements,
          " elements");
    const std::int64_t element_count = weight.n * weight.k;
    const std::int64_t block_count = nf4_block_count(element_count, weight.block_size);
    bytes(weight.codes, "codes", nf4_code_bytes(element_count));
    check(weight.nested_absmax.is_present == weight.nested_offset.is_present, operation_,
          ": nested_absmax and nested_offset come together or not at all");
    if (weight.is_nested()) {
      bytes(weight.absmax, "absmax", block_count);
      bytes(weight.nested_absmax, "nested_absmax", 4 * nf4_nested_block_count(block_count));
      bytes(weight.nested_offset, "nested_offset", 4);
    } else {
      bytes(weight.absmax, "absmax", 4 * block_count);
    }
  }

 private:
  /// A CPU reads a number at any address. A GPU faults, and no later CUDA call of the process works.
  void aligned(const TensorView& tensor, const char* argument) const {
    const auto element = static_cast<std::uintptr_t>(element_bytes(tensor.dtype));
    const std::uintptr_t excess = reinterpret_cast<std::uintptr_t>(tensor.data) % element;
    check(excess == 0, operation_, ": ", argument, " is ", tensor.dtype, ", but its memory begins ",
          excess, " bytes past a multiple of ", element, "; pass ", argument, ".clone()");
  }

  void bytes(const TensorView& tensor, const char* argument, std::int64_t wanted) const {
    dtype(tensor, argument, DType::uint8);
    numel(tensor, argument, wanted);
  }

  // Bytes of any dtype then fit an int64 with room for the arithmetic of blocks.
  static constexpr std::int64_t max_elements = std::numeric_limits<std::int64_t>::max() / 16;

  const char* operation_;
  Device device_;
};

}  // namespace qlora
