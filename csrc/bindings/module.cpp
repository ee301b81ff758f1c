// The extension module qlora_native._core: errors, build information, and the groups of operations.
#include <pybind11/stl.h>

#include "bindings/register.h"
#include "core/backend.h"

namespace qlora {
namespace {

/// torch's own error where torch is loaded, so that code which frees memory and tries again does so
/// for this library's too. It is looked up at each error: nothing here imports torch.
void set_out_of_memory(const char* text) {
  if (const auto torch =
          py::reinterpret_steal<py::object>(PyImport_GetModule(py::str("torch").ptr()))) {
    const auto type =
        py::reinterpret_steal<py::object>(PyObject_GetAttrString(torch.ptr(), "OutOfMemoryError"));
    if (type) return py::set_error(type, text);
  }
  PyErr_Clear();
  py::set_error(PyExc_MemoryError, text);
}

/// Python picks the class of its number, as FileNotFoundError. A path, which the text has in it, need
/// not be UTF-8.
void set_file_error(const FileError& error) {
  const auto text = py::reinterpret_steal<py::object>(PyUnicode_DecodeFSDefault(error.what()));
  const auto path =
      py::reinterpret_steal<py::object>(PyUnicode_DecodeFSDefault(error.path.c_str()));
  if (!text || !path) return;
  const auto value = py::reinterpret_steal<py::object>(
      PyObject_CallFunction(PyExc_OSError, "iOO", error.number, text.ptr(), path.ptr()));
  if (value) PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(value.ptr())), value.ptr());
}

void register_errors() {
  py::register_local_exception_translator([](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const InvalidArgument& e) {
      py::set_error(PyExc_ValueError, e.what());
    } catch (const Unsupported& e) {
      py::set_error(PyExc_NotImplementedError, e.what());
    } catch (const OutOfMemory& e) {
      set_out_of_memory(e.what());
    } catch (const HostOutOfMemory& e) {
      py::set_error(PyExc_MemoryError, e.what());
    } catch (const FileError& e) {
      set_file_error(e);
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

py::dict device_report() {
  CudaDeviceReport report;
  {
    const py::gil_scoped_release no_gil;  // the driver takes its time to start
    report = cuda_device_report();
  }
  py::dict out;
  out["usable"] = py::cast(report.usable);
  out["problems"] = py::cast(report.problems);
  return out;
}

}  // namespace
}  // namespace qlora

PYBIND11_MODULE(_core, module) {
  module.doc() =
      "The native core of qlora_native; csrc/core/operations.h describes the operations.";
  qlora::register_errors();
  module.def("build_info", &qlora::build_info);
  module.def("cuda_device_report", &qlora::device_report);
  qlora::register_nf4_codec(module);
  qlora::register_linear(module);
  qlora::register_lora(module);
  qlora::register_optimizer(module);
  qlora::register_paged_buffer(module);
}
