// The extension module qlora_native._core: errors, build information, and the groups of operations.
#include <pybind11/stl.h>

#include "bindings/register.h"
#include "core/backend.h"

namespace qlora {
namespace {

DType dtype_of(py::handle dtype) {
  // str(dtype) is "torch.bfloat16"; the name after the dot is looked up once for each dtype object,
  // which torch never frees.
  static constexpr DType known[] = {DType::uint8, DType::int64, DType::float16, DType::bfloat16,
                                    DType::float32};
  static PyObject* objects[std::size(known)] = {};
  for (std::size_t i = 0; i < std::size(known); ++i) {
    if (objects[i] == dtype.ptr()) return known[i];
  }
  const auto text = py::str(dtype).cast<std::string>();
  for (std::size_t i = 0; i < std::size(known); ++i) {
    if (text == std::string("torch.") + name_of(known[i])) {
      objects[i] = dtype.ptr();
      return known[i];
    }
  }
  throw InvalidArgument(
      message("a tensor has dtype ", text, ", want float32, bfloat16, float16, uint8 or int64"));
}

Device device_of(py::handle tensor) {
  if (tensor.attr("is_cpu").cast<bool>()) return {DeviceType::cpu, 0};
  if (tensor.attr("is_cuda").cast<bool>()) {
    return {DeviceType::cuda, tensor.attr("get_device")().cast<int>()};
  }
  throw InvalidArgument(message("a tensor is on device ",
                                py::str(tensor.attr("device")).cast<std::string>(),
                                ", want cpu or cuda"));
}

}  // namespace

TensorView view_of_tensor(py::handle tensor) {
  TensorView view;
  view.is_present = true;
  view.dtype = dtype_of(tensor.attr("dtype"));
  view.device = device_of(tensor);
  view.is_contiguous = tensor.attr("is_contiguous")().cast<bool>();
  for (const py::handle size : py::reinterpret_borrow<py::tuple>(tensor.attr("shape"))) {
    view.shape.push_back(size.cast<std::int64_t>());
  }
  view.data = reinterpret_cast<void*>(tensor.attr("data_ptr")().cast<std::uintptr_t>());
  check(view.data != nullptr || view.numel() == 0, "a tensor of shape ", view.shape,
        " has no memory: it is fake, or its storage was freed");
  return view;
}

namespace {

void register_errors() {
  py::register_local_exception_translator([](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const InvalidArgument& e) {
      py::set_error(PyExc_ValueError, e.what());
    } catch (const Unsupported& e) {
      py::set_error(PyExc_NotImplementedError, e.what());
    } catch (const OutOfMemory& e) {
      py::set_error(PyExc_MemoryError, e.what());
    } catch (const CudaError& e) {
      py::set_error(PyExc_RuntimeError, e.what());
    }
  });
}

py::dict build_info() {
  const CpuInfo cpu = cpu_info();
  const CudaInfo cuda = cuda_info();
  py::dict info;
  info["version"] = QLORA_VERSION;
  info["cxx_compiler"] = QLORA_CXX_COMPILER;
  info["cpu_sets"] = py::cast(cpu.sets);
  info["cpu_set"] = cpu.active_set;
  info["cuda"] = cuda.is_compiled;
  info["cuda_compiler"] = cuda.compiler;
  info["cuda_archs"] = cuda.architectures;
  return info;
}

}  // namespace
}  // namespace qlora

PYBIND11_MODULE(_core, module) {
  module.doc() =
      "The native core of qlora_native; csrc/core/operations.h describes the operations.";
  qlora::register_errors();
  module.def("build_info", &qlora::build_info);
  qlora::register_nf4_codec(module);
  qlora::register_linear(module);
  qlora::register_lora(module);
  qlora::register_adamw(module);
}
