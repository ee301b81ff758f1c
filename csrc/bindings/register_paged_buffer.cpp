#include <optional>
#include <string>

#include <pybind11/stl.h>

#include "bindings/dlpack_export.h"
#include "bindings/register.h"
#include "core/paged_buffer.h"

namespace qlora {
namespace {

using SharedBuffer = std::shared_ptr<PagedBuffer>;

/// Ends a buffer without the GIL: it waits for the device, and other threads need not. The last
/// owner may be a tensor, which also a thread of torch's that never had the GIL lets go.
struct DeleteWithoutGil {
  void operator()(PagedBuffer* buffer) const {
    std::optional<py::gil_scoped_release> no_gil;
    if (Py_IsInitialized() && PyGILState_Check()) no_gil.emplace();
    delete buffer;
  }
};

/// A piece of a buffer's memory, which torch.from_dlpack makes a tensor of bytes. The piece, and the
/// tensor, keep the buffer.
struct PagedMemory {
  SharedBuffer buffer;
  std::byte* memory;
  std::int64_t bytes;
  Device device;  // whose address `memory` is
};

Device parse_device(const std::string& text) {
  if (text == "cpu") return {DeviceType::cpu, 0};
  const std::string prefix = "cuda:", digits = "0123456789";
  const bool is_indexed = text.starts_with(prefix) && text.size() > prefix.size() &&
                          text.size() < prefix.size() + 4 &&
                          text.find_first_not_of(digits, prefix.size()) == std::string::npos;
  check(is_indexed, "PagedBuffer: device is '", text,
        "', want cpu or cuda:N; which device is the current one, torch alone knows");
  return {DeviceType::cuda, std::stoi(text.substr(prefix.size()))};
}

PagingStrategy parse_strategy(const std::string& text) {
  for (const PagingStrategy strategy : {PagingStrategy::automatic, PagingStrategy::ordinary,
                                        PagingStrategy::managed, PagingStrategy::pinned}) {
    if (text == message(strategy)) return strategy;
  }
  throw InvalidArgument(message("PagedBuffer: strategy is '", text,
                                "', want automatic, ordinary, managed or pinned"));
}

SharedBuffer make(const std::string& device, std::int64_t bytes, std::int64_t page_bytes,
                  const std::string& strategy, std::optional<std::int64_t> resident_bytes) {
  // Pinning memory takes a while. Here, and not by a call guard, under which pybind11 would note the
  // new object without the GIL.
  const py::gil_scoped_release no_gil;
  auto buffer = make_paged_buffer(parse_device(device), {.bytes = bytes,
                                                         .page_bytes = page_bytes,
                                                         .strategy = parse_strategy(strategy),
                                                         .resident_bytes = resident_bytes});
  return SharedBuffer(buffer.release(), DeleteWithoutGil{});
}

Device device_of_data(const PagedBuffer& buffer) {
  return buffer.is_addressable_by_device() ? buffer.device() : Device{};
}

PagedMemory memory_of(const SharedBuffer& buffer, std::int64_t offset, std::int64_t bytes) {
  check(offset >= 0 && bytes >= 0 && bytes <= buffer->bytes() && offset <= buffer->bytes() - bytes,
        "PagedBuffer.memory: the range is ", bytes, " bytes from ", offset,
        " on, want a part of the ", buffer->bytes(), " bytes");
  std::byte* const data = buffer->data();
  return {buffer, data == nullptr ? nullptr : data + offset, bytes, device_of_data(*buffer)};
}

py::dict report(const PagedBuffer& buffer) {
  const PagedBufferReport report = buffer.report();
  py::dict out;
  out["unknown_bytes"] = report.unknown_bytes;
  out["host_bytes"] = report.host_bytes;
  out["device_bytes"] = report.device_bytes;
  out["moved_to_device_bytes"] = report.moved_to_device_bytes;
  out["moved_to_host_bytes"] = report.moved_to_host_bytes;
  return out;
}

void* to_stream(std::uintptr_t stream) { return reinterpret_cast<void*>(stream); }

}  // namespace

void register_paged_buffer(py::module_& module) {
  py::class_<PagedMemory>(module, "PagedMemory")
      .def_property_readonly(
          "address",
          [](const PagedMemory& piece) { return reinterpret_cast<std::uintptr_t>(piece.memory); })
      .def_readonly("bytes", &PagedMemory::bytes)
      .def("__dlpack_device__",
           [](const PagedMemory& piece) { return dlpack::device_pair(piece.device); })
      .def(
          "__dlpack__",
          [](const PagedMemory& piece, const py::object& /*stream: nothing is on its way here*/,
             const py::object& /*max_version: a capsule of version 0 is always right*/,
             const py::object& dl_device, const py::object& copy) {
            dlpack::check_request(piece.device, dl_device, copy);
            return dlpack::export_bytes(piece.memory, piece.bytes, piece.device, piece.buffer);
          },
          py::kw_only(), py::arg("stream") = py::none(), py::arg("max_version") = py::none(),
          py::arg("dl_device") = py::none(), py::arg("copy") = py::none());

  py::class_<PagedBuffer, SharedBuffer>(module, "PagedBuffer")
      .def(py::init(&make), py::arg("device"), py::arg("bytes"), py::kw_only(),
           py::arg("page_bytes") = PagedBufferOptions{}.page_bytes,
           py::arg("strategy") = "automatic", py::arg("resident_bytes") = py::none())
      .def_property_readonly("device",
                             [](const PagedBuffer& buffer) { return message(buffer.device()); })
      .def_property_readonly("strategy",
                             [](const PagedBuffer& buffer) { return message(buffer.strategy()); })
      .def_property_readonly("bytes", &PagedBuffer::bytes)
      .def_property_readonly("page_bytes", &PagedBuffer::page_bytes)
      .def_property_readonly("page_count", &PagedBuffer::page_count)
      .def("memory", &memory_of, py::arg("offset"), py::arg("bytes"))
      .def(
          "begin",
          [](const SharedBuffer& buffer, std::int64_t page, std::uintptr_t stream) {
            std::byte* const memory = buffer->begin(page, to_stream(stream));
            return PagedMemory{buffer, memory, buffer->page_range(page).bytes, buffer->device()};
          },
          py::arg("page"), py::arg("stream"), NoGil())
      .def(
          "end",
          [](PagedBuffer& buffer, std::int64_t page, std::uintptr_t stream) {
            buffer.end(page, to_stream(stream));
          },
          py::arg("page"), py::arg("stream"), NoGil())
      .def(
          "join",
          [](PagedBuffer& buffer, std::uintptr_t stream) { buffer.join(to_stream(stream)); },
          py::arg("stream"), NoGil())
      .def(
          "prefetch_to_device",
          [](PagedBuffer& buffer, std::int64_t offset, std::int64_t bytes, std::uintptr_t stream) {
            buffer.prefetch_to_device({offset, bytes}, to_stream(stream));
          },
          py::arg("offset"), py::arg("bytes"), py::arg("stream"), NoGil())
      .def(
          "prefetch_to_host",
          [](PagedBuffer& buffer, std::int64_t offset, std::int64_t bytes, std::uintptr_t stream) {
            buffer.prefetch_to_host({offset, bytes}, to_stream(stream));
          },
          py::arg("offset"), py::arg("bytes"), py::arg("stream"), NoGil())
      .def("report", &report);
}

}  // namespace qlora
