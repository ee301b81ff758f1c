#include "bindings/register.h"

namespace qlora {

void register_lora(py::module_& module) {
  module.def(
      "lora_forward",
      [](const TensorView& x, const TensorView& lora_a, const TensorView& lora_b, float scaling,
         const TensorView& t, const TensorView& y, int num_threads, std::uintptr_t stream) {
        lora_forward({.x = rows_of(x),
                      .lora_a = lora_a,
                      .lora_b = lora_b,
                      .scaling = scaling,
                      .t = t,
                      .y = rows_of(y)},
                     make_context(num_threads, stream));
      },
      py::arg("x"), py::arg("lora_a"), py::arg("lora_b"), py::arg("scaling"), py::arg("t"),
      py::arg("y"), py::arg("num_threads"), py::arg("stream"), NoGil());
  module.def(
      "lora_backward",
      [](const TensorView& dy, const TensorView& x, const TensorView& t, const TensorView& lora_a,
         const TensorView& lora_b, float scaling, const TensorView& grad_a,
         const TensorView& grad_b, const TensorView& dx, int num_threads, std::uintptr_t stream) {
        lora_backward({.dy = rows_of(dy),
                       .x = rows_of(x),
                       .t = t,
                       .lora_a = lora_a,
                       .lora_b = lora_b,
                       .scaling = scaling,
                       .grad_a = grad_a,
                       .grad_b = grad_b,
                       .dx = rows_of(dx)},
                      make_context(num_threads, stream));
      },
      py::arg("dy"), py::arg("x"), py::arg("t"), py::arg("lora_a"), py::arg("lora_b"),
      py::arg("scaling"), py::arg("grad_a"), py::arg("grad_b"), py::arg("dx").none(true),
      py::arg("num_threads"), py::arg("stream"), NoGil());
  module.def(
      "dropout",
      [](const TensorView& x, double p, const TensorView& seed, const TensorView& out,
         int num_threads,
         std::uintptr_t stream) { dropout(x, p, seed, out, make_context(num_threads, stream)); },
      py::arg("x"), py::arg("p"), py::arg("seed"), py::arg("out"), py::arg("num_threads"),
      py::arg("stream"), NoGil());
}

}  // namespace qlora
