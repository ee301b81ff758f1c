// What the bindings of PagedBuffer and of PagedState share.
#pragma once

#include <filesystem>
#include <memory>
#include <optional>
#include <string>

#include <pybind11/pybind11.h>
#include <pybind11/stl/filesystem.h>

#include "core/paged_buffer.h"

namespace qlora {

/// A piece of a buffer's memory, which torch.from_dlpack makes a tensor of bytes. The piece, and the
/// tensor, keep the buffer.
struct PagedMemory {
  std::shared_ptr<PagedBuffer> buffer;
  std::byte* memory;
  std::int64_t bytes;
  Device device;  // whose address `memory` is
};

/// A piece where the host sees it.
PagedMemory memory_of(const std::shared_ptr<PagedBuffer>& buffer, const ByteRange& range);

/// Ends a buffer without the GIL: it waits for the device, and other threads need not. The last
/// owner may be a tensor, which also a thread of torch's that never had the GIL lets go.
struct DeleteWithoutGil {
  template <typename T>
  void operator()(T* object) const {
    std::optional<pybind11::gil_scoped_release> no_gil;
    if (Py_IsInitialized() && PyGILState_Check()) no_gil.emplace();
    delete object;
  }
};

/// "cpu" or "cuda:N".
Device parse_device(const char* operation, const std::string& text);

/// A str or an os.PathLike, in the bytes that the file system knows.
using DirectoryArgument = std::optional<std::filesystem::path>;
inline std::optional<std::string> to_page_file(const DirectoryArgument& directory) {
  if (!directory) return std::nullopt;
  return directory->string();
}

PagingStrategy parse_strategy(const char* operation, const std::string& text);

pybind11::dict report_of(const PagedBufferReport& report);

}  // namespace qlora
