// What the register_*.cpp files share. Each binds one group of operations: convert, release the
// GIL, call, return.
#pragma once

#include <pybind11/pybind11.h>

#include "bindings/tensor_caster.h"
#include "core/operations.h"

namespace qlora {

namespace py = pybind11;

/// Where an operation runs, as Python passes it: the last two arguments of every binding.
inline ExecutionContext make_context(int num_threads, std::uintptr_t stream) {
  return {.num_threads = num_threads, .stream = reinterpret_cast<void*>(stream)};
}

/// x[..., k] as the matrix [rows, k] that the operations take.
inline TensorView rows_of(TensorView tensor) {
  const Shape shape = tensor.shape;
  if (shape.rank == 0 || shape.rank == 2) return tensor;
  std::int64_t rows = 1;
  for (int i = 0; i + 1 < shape.rank; ++i) rows *= shape[i];
  tensor.shape = {rows, shape[shape.rank - 1]};
  return tensor;
}

/// The arguments are converted with the GIL held; the operation runs without it.
using NoGil = py::call_guard<py::gil_scoped_release>;

void register_nf4_codec(py::module_& module);
void register_linear(py::module_& module);
void register_lora(py::module_& module);
void register_optimizer(py::module_& module);
void register_paged_buffer(py::module_& module);

}  // namespace qlora
