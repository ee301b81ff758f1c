// The extension module qlora_native._core: errors, build information, and the groups of operations.
#include <pybind11/stl.h>

#include "bindings/register.h"
#include "core/backend.h"

namespace qlora {
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
