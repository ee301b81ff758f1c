#include "bindings/register.h"

namespace qlora {

void register_nf4_codec(py::module_& module) {
  module.def(
      "nf4_quantize",
      [](const TensorView& w, const NF4Weight& out, int num_threads, std::uintptr_t stream) {
        nf4_quantize(w, out, make_context(num_threads, stream));
      },
      py::arg("w"), py::arg("out"), py::arg("num_threads"), py::arg("stream"), NoGil());
  module.def(
      "nf4_dequantize",
      [](const NF4Weight& weight, const TensorView& out, int num_threads, std::uintptr_t stream) {
        nf4_dequantize(weight, out, make_context(num_threads, stream));
      },
      py::arg("weight"), py::arg("out"), py::arg("num_threads"), py::arg("stream"), NoGil());
  module.def(
      "nf4_dequantize_absmax",
      [](const NF4Weight& weight, const TensorView& out, int num_threads, std::uintptr_t stream) {
        nf4_dequantize_absmax(weight, out, make_context(num_threads, stream));
      },
      py::arg("weight"), py::arg("out"), py::arg("num_threads"), py::arg("stream"), NoGil());
}

}  // namespace qlora
