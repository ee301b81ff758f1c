#include "bindings/register.h"

namespace qlora {

void register_linear(py::module_& module) {
  module.def(
      "nf4_linear",
      [](const TensorView& x, const NF4Weight& weight, const TensorView& bias, const TensorView& y,
         int num_threads, std::uintptr_t stream) {
        nf4_linear(rows_of(x), weight, bias, rows_of(y), make_context(num_threads, stream));
      },
      py::arg("x"), py::arg("weight"), py::arg("bias").none(true), py::arg("y"),
      py::arg("num_threads"), py::arg("stream"), NoGil());
  module.def(
      "nf4_linear_grad_input",
      [](const TensorView& dy, const NF4Weight& weight, const TensorView& dx, int num_threads,
         std::uintptr_t stream) {
        nf4_linear_grad_input(rows_of(dy), weight, rows_of(dx), make_context(num_threads, stream));
      },
      py::arg("dy"), py::arg("weight"), py::arg("dx"), py::arg("num_threads"), py::arg("stream"),
      NoGil());
}

}  // namespace qlora
