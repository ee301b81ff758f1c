#include "bindings/dlpack_export.h"

#include <utility>

#include "bindings/dlpack.h"

namespace qlora::dlpack {
namespace {

namespace py = pybind11;

/// What a capsule points to, with what it points to. The consumer ends it by its deleter.
struct Export {
  ManagedTensor tensor;
  std::int64_t shape, stride;
  std::shared_ptr<const void> owner;
};

void delete_export(ManagedTensor* tensor) { delete static_cast<Export*>(tensor->manager_ctx); }

/// A consumer renames the capsule that it takes: this one nobody took.
void delete_unused(PyObject* capsule) {
  if (!PyCapsule_IsValid(capsule, managed_tensor_name)) return;
  auto* const tensor =
      static_cast<ManagedTensor*>(PyCapsule_GetPointer(capsule, managed_tensor_name));
  tensor->deleter(tensor);
}

std::int32_t code_of(Device device) {
  return device.type == DeviceType::cuda ? device_cuda : device_cpu;
}

}  // namespace

py::tuple device_pair(Device device) { return py::make_tuple(code_of(device), device.index); }

void check_request(Device device, const py::object& dl_device, const py::object& copy) {
  if (!dl_device.is_none() && !dl_device.equal(device_pair(device))) {
    throw py::buffer_error(message("this memory is on ", device, " and is not copied elsewhere"));
  }
  if (!copy.is_none() && copy.cast<bool>()) throw py::buffer_error("this memory is not copied");
}

py::capsule export_bytes(std::byte* memory, std::int64_t bytes, Device device,
                         std::shared_ptr<const void> owner) {
  auto exported = std::make_unique<Export>();
  exported->shape = bytes;
  exported->stride = 1;
  exported->owner = std::move(owner);
  exported->tensor = {.tensor = {.data = memory,
                                 .device_type = code_of(device),
                                 .device_id = device.index,
                                 .rank = 1,
                                 .dtype = {.code = type_uint, .bits = 8, .lanes = 1},
                                 .shape = &exported->shape,
                                 .strides = &exported->stride,
                                 .byte_offset = 0},
                      .manager_ctx = exported.get(),
                      .deleter = delete_export};
  PyObject* const capsule = PyCapsule_New(&exported->tensor, managed_tensor_name, delete_unused);
  if (capsule == nullptr) throw py::error_already_set();
  exported.release();  // the capsule has it now
  return py::reinterpret_steal<py::capsule>(capsule);
}

}  // namespace qlora::dlpack
