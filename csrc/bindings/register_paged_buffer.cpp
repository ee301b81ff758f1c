#include <optional>
#include <string>

#include <pybind11/stl.h>

#include "bindings/dlpack_export.h"
#include "bindings/paged_memory.h"
#include "bindings/register.h"

namespace qlora {

Device parse_device(const char* operation, const std::string& text) {
  if (text == "cpu") return {DeviceType::cpu, 0};
  const std::string prefix = "cuda:", digits = "0123456789";
  const bool is_indexed = text.starts_with(prefix) && text.size() > prefix.size() &&
                          text.size() < prefix.size() + 4 &&
                          text.find_first_not_of(digits, prefix.size()) == std::string::npos;
  check(is_indexed, operation, ": device is '", text,
        "', want cpu or cuda:N; which device is the current one, torch alone knows");
  return {DeviceType::cuda, std::stoi(text.substr(prefix.size()))};
}

PagingStrategy parse_strategy(const char* operation, const std::string& text) {
  for (const PagingStrategy strategy :
       {PagingStrategy::automatic, PagingStrategy::ordinary, PagingStrategy::file,
        PagingStrategy::managed, PagingStrategy::pinned}) {
    if (text == message(strategy)) return strategy;
  }
  throw InvalidArgument(message(operation, ": strategy is '", text,
                                "', want automatic, ordinary, file, managed or pinned"));
}

PagedMemory memory_of(const std::shared_ptr<PagedBuffer>& buffer, const ByteRange& range) {
  std::byte* const data = buffer->data();
  return {buffer, data == nullptr ? nullptr : data + range.offset, range.bytes,
          buffer->is_addressable_by_device() ? buffer->device() : Device{}};
}

py::dict report_of(const PagedBufferReport& report) {
  py::dict out;
  out["unknown_bytes"] = report.unknown_bytes;
  out["host_bytes"] = report.host_bytes;
  out["device_bytes"] = report.device_bytes;
  out["moved_to_device_bytes"] = report.moved_to_device_bytes;
  out["moved_to_host_bytes"] = report.moved_to_host_bytes;
  out["refused_bytes"] = report.refused_bytes;
  return out;
}

namespace {

using SharedBuffer = std::shared_ptr<PagedBuffer>;

SharedBuffer make(const std::string& device, std::int64_t bytes, std::int64_t page_bytes,
                  const std::string& strategy, std::optional<std::int64_t> resident_bytes,
                  const DirectoryArgument& page_file) {
  // Pinning memory takes a while. Here, and not by a call guard, under which pybind11 would note the
  // new object without the GIL.
  const py::gil_scoped_release no_gil;
  const char* const operation = "PagedBuffer";
  auto buffer = make_paged_buffer(parse_device(operation, device),
                                  {.bytes = bytes,
                                   .page_bytes = page_bytes,
                                   .strategy = parse_strategy(operation, strategy),
                                   .resident_bytes = resident_bytes,
                                   .page_file = to_page_file(page_file)});
  return SharedBuffer(buffer.release(), DeleteWithoutGil{});
}

PagedMemory checked_memory_of(const SharedBuffer& buffer, std::int64_t offset, std::int64_t bytes) {
  check(offset >= 0 && bytes >= 0 && bytes <= buffer->bytes() && offset <= buffer->bytes() - bytes,
        "PagedBuffer.memory: the range is ", bytes, " bytes from ", offset,
        " on, want a part of the ", buffer->bytes(), " bytes");
  return memory_of(buffer, {offset, bytes});
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
           py::arg("strategy") = "automatic", py::arg("resident_bytes") = py::none(),
           py::arg("page_file") = py::none())
      .def_property_readonly("device",
                             [](const PagedBuffer& buffer) { return message(buffer.device()); })
      .def_property_readonly("strategy",
                             [](const PagedBuffer& buffer) { return message(buffer.strategy()); })
      .def_property_readonly("bytes", &PagedBuffer::bytes)
      .def_property_readonly("page_bytes", &PagedBuffer::page_bytes)
      .def_property_readonly("page_count", &PagedBuffer::page_count)
      .def("memory", &checked_memory_of, py::arg("offset"), py::arg("bytes"))
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
          "make_resident",
          [](PagedBuffer& buffer, std::uintptr_t stream) {
            return buffer.make_resident(to_stream(stream));
          },
          py::arg("stream"), NoGil())
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
      .def("report", [](const PagedBuffer& buffer) { return report_of(buffer.report()); });
}

}  // namespace qlora
