// Converts a torch.Tensor to a TensorView: torch is neither included nor linked.
//
// A plain tensor is read through DLPack's C exchange API where torch has one. Any other, and every
// one of an older torch, is asked for `dtype`, `shape`, `is_cpu`, `is_cuda`, `get_device()`,
// `is_contiguous()` and `data_ptr()`. Nothing is kept from call to call: memory may be swapped under
// a parameter. None becomes an absent view. An NF4Weight comes as the tuple (codes, absmax,
// nested_absmax | None, nested_offset | None, n, k, block_size).
#pragma once

#include <pybind11/pybind11.h>

#include "core/operations.h"

namespace qlora {

bool is_tensor(pybind11::handle object);

/// Throws InvalidArgument on a dtype or device that the core has no name for.
TensorView view_of_tensor(pybind11::handle tensor);

}  // namespace qlora

namespace pybind11::detail {

template <>
struct type_caster<qlora::TensorView> {
  PYBIND11_TYPE_CASTER(qlora::TensorView, const_name("torch.Tensor"));

  bool load(handle source, bool /*convert*/) {
    if (!source.is_none()) {
      if (!qlora::is_tensor(source)) return false;
      value = qlora::view_of_tensor(source);
    }
    return true;
  }
};

template <>
struct type_caster<qlora::NF4Weight> {
  PYBIND11_TYPE_CASTER(qlora::NF4Weight, const_name("NF4Tensors"));

  bool load(handle source, bool /*convert*/) {
    if (!PyTuple_Check(source.ptr()) || PyTuple_GET_SIZE(source.ptr()) != 7) return false;
    const auto item = [&](Py_ssize_t i) { return handle(PyTuple_GET_ITEM(source.ptr(), i)); };
    value.codes = item(0).cast<qlora::TensorView>();
    value.absmax = item(1).cast<qlora::TensorView>();
    value.nested_absmax = item(2).cast<qlora::TensorView>();
    value.nested_offset = item(3).cast<qlora::TensorView>();
    value.n = item(4).cast<std::int64_t>();
    value.k = item(5).cast<std::int64_t>();
    value.block_size = item(6).cast<std::int64_t>();
    return true;
  }
};

}  // namespace pybind11::detail
