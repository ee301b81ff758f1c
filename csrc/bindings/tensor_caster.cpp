#include "bindings/tensor_caster.h"

#include <cstddef>
#include <iterator>
#include <optional>
#include <string>

#include <pybind11/gil_safe_call_once.h>

#include "bindings/dlpack.h"

namespace qlora {
namespace {

namespace py = pybind11;

// ---- through DLPack's C exchange API: under 0.1 µs a tensor, the check of it included

/// What torch offers, looked up once.
struct Torch {
  // Exactly these types are read by DLPack: a subclass may answer for itself.
  PyTypeObject* tensor = nullptr;
  PyTypeObject* parameter = nullptr;
  int (*view_of_object)(void*, dlpack::Tensor*) = nullptr;  // null: an older torch

  bool reads(py::handle object) const {
    return view_of_object != nullptr &&
           (Py_TYPE(object.ptr()) == tensor || Py_TYPE(object.ptr()) == parameter);
  }
};

Torch find_torch() {
  const py::module_ module = py::module_::import("torch");
  // The types are never freed: torch cannot be unloaded.
  const auto type = [](const py::object& object) {
    return reinterpret_cast<PyTypeObject*>(py::object(object).release().ptr());
  };
  Torch torch{.tensor = type(module.attr("Tensor")),
              .parameter = type(module.attr("nn").attr("Parameter"))};
  const py::object capsule =
      py::getattr(module.attr("Tensor"), "__dlpack_c_exchange_api__", py::none());
  if (PyCapsule_IsValid(capsule.ptr(), dlpack::capsule_name)) {
    const auto* api = static_cast<const dlpack::ExchangeApi*>(
        PyCapsule_GetPointer(capsule.ptr(), dlpack::capsule_name));
    while (api != nullptr && api->version.major != dlpack::major_version) api = api->previous;
    if (api != nullptr) torch.view_of_object = api->view_of_object;
  }
  return torch;
}

const Torch& torch() {
  PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<Torch> found;
  return found.call_once_and_store_result(find_torch).get_stored();
}

std::optional<DType> dtype_of(dlpack::DataType dtype) {
  if (dtype.lanes != 1) return std::nullopt;
  const auto is = [&](dlpack::TypeCode code, int bits) {
    return dtype.code == code && dtype.bits == bits;
  };
  if (is(dlpack::type_float, 32)) return DType::float32;
  if (is(dlpack::type_bfloat, 16)) return DType::bfloat16;
  if (is(dlpack::type_float, 16)) return DType::float16;
  if (is(dlpack::type_uint, 8)) return DType::uint8;
  if (is(dlpack::type_int, 64)) return DType::int64;
  return std::nullopt;
}

/// As torch's is_contiguous(): the stride of a dimension of size 1 means nothing.
bool is_contiguous(const dlpack::Tensor& tensor, const Shape& shape) {
  if (shape.numel() == 0) return true;
  std::int64_t wanted = 1;
  for (int i = shape.rank - 1; i >= 0; --i) {
    if (shape[i] != 1 && tensor.strides[i] != wanted) return false;
    wanted *= shape[i];
  }
  return true;
}

/// Nothing where DLPack or the core has no name for what the tensor is: asking it makes the message.
std::optional<TensorView> view_through_dlpack(py::handle object) {
  dlpack::Tensor tensor;
  if (torch().view_of_object(object.ptr(), &tensor) != 0) {
    PyErr_Clear();
    return std::nullopt;
  }
  const std::optional<DType> dtype = dtype_of(tensor.dtype);
  if (!dtype || tensor.rank > Shape::max_rank) return std::nullopt;
  TensorView view;
  switch (tensor.device_type) {
    case dlpack::device_cpu: break;
    case dlpack::device_cuda: view.device = {DeviceType::cuda, tensor.device_id}; break;
    default: return std::nullopt;
  }
  view.dtype = *dtype;
  for (int i = 0; i < tensor.rank; ++i) view.shape.push_back(tensor.shape[i]);
  view.is_contiguous = is_contiguous(tensor, view.shape);
  view.data = static_cast<std::byte*>(tensor.data) + tensor.byte_offset;
  return view;
}

// ---- by asking the object: 0.4 µs a tensor

/// Attribute names as Python keeps them, so that a look-up makes no string.
struct Names {
  static PyObject* intern(const char* text) {
    PyObject* const name = PyUnicode_InternFromString(text);
    if (name == nullptr) throw py::error_already_set();
    return name;
  }
  PyObject* dtype = intern("dtype");
  PyObject* shape = intern("shape");
  PyObject* is_cpu = intern("is_cpu");
  PyObject* is_cuda = intern("is_cuda");
  PyObject* get_device = intern("get_device");
  PyObject* is_contiguous = intern("is_contiguous");
  PyObject* data_ptr = intern("data_ptr");
};

const Names& names() {
  PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<Names> interned;
  return interned.call_once_and_store_result([] { return Names{}; }).get_stored();
}

py::object checked(PyObject* result) {
  if (result == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

py::object get(py::handle object, PyObject* name) {
  return checked(PyObject_GetAttr(object.ptr(), name));
}

py::object call(py::handle object, PyObject* name) {
  return checked(PyObject_CallMethodNoArgs(object.ptr(), name));
}

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
  if (get(tensor, names().is_cpu).cast<bool>()) return {DeviceType::cpu, 0};
  if (get(tensor, names().is_cuda).cast<bool>()) {
    return {DeviceType::cuda, call(tensor, names().get_device).cast<int>()};
  }
  throw InvalidArgument(message("a tensor is on device ",
                                py::str(tensor.attr("device")).cast<std::string>(),
                                ", want cpu or cuda"));
}

TensorView view_by_asking(py::handle tensor) {
  TensorView view;
  view.dtype = dtype_of(get(tensor, names().dtype));
  view.device = device_of(tensor);
  view.is_contiguous = call(tensor, names().is_contiguous).cast<bool>();
  for (const py::handle size : get(tensor, names().shape).cast<py::tuple>()) {
    view.shape.push_back(size.cast<std::int64_t>());
  }
  view.data = reinterpret_cast<void*>(call(tensor, names().data_ptr).cast<std::uintptr_t>());
  return view;
}

}  // namespace

bool is_tensor(py::handle object) {
  return torch().reads(object) || PyObject_HasAttr(object.ptr(), names().data_ptr) == 1;
}

TensorView view_of_tensor(py::handle tensor) {
  std::optional<TensorView> read;
  if (torch().reads(tensor)) read = view_through_dlpack(tensor);
  TensorView view = read ? *read : view_by_asking(tensor);
  view.is_present = true;
  check(view.data != nullptr || view.numel() == 0, "a tensor of shape ", view.shape,
        " has no memory: it is fake, or its storage was freed");
  return view;
}

}  // namespace qlora
