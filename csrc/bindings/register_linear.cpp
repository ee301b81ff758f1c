#include <string_view>

#include "bindings/register.h"
#include "core/backend.h"

namespace qlora {
namespace {

bool is_grad_input(std::string_view direction) {
  check(direction == "forward" || direction == "grad_input", "nf4_matmul_strategy: direction is ",
        direction, ", want forward or grad_input");
  return direction == "grad_input";
}

DType float_dtype_of(std::string_view name) {
  for (const DType dtype : {DType::float32, DType::bfloat16, DType::float16}) {
    if (name == name_of(dtype)) return dtype;
  }
  throw InvalidArgument(
      message("nf4_matmul_strategy: dtype is ", name, ", want float32, bfloat16 or float16"));
}

}  // namespace

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
  module.def(
      "nf4_matmul_strategy",
      [](std::string_view direction, std::int64_t m, std::int64_t n, std::int64_t k,
         std::string_view dtype, std::int64_t block_size, int device_index) {
        const NF4MatmulShape shape{.is_grad_input = is_grad_input(direction),
                                   .m = m,
                                   .n = n,
                                   .k = k,
                                   .dtype = float_dtype_of(dtype),
                                   .block_size = block_size};
        return cuda_nf4_matmul_strategy(shape, device_index);
      },
      py::arg("direction"), py::arg("m"), py::arg("n"), py::arg("k"), py::arg("dtype"),
      py::arg("block_size"), py::arg("device_index"));
}

}  // namespace qlora
