// Hands memory out through DLPack's `__dlpack__`.
#pragma once

#include <memory>

#include <pybind11/pybind11.h>

#include "core/tensor_view.h"

namespace qlora::dlpack {

/// What `__dlpack_device__` returns. Memory of CUDA's that the host can use too is called cuda:
/// torch takes neither of DLPack's names for it (kDLCUDAManaged, kDLCUDAHost).
pybind11::tuple device_pair(Device device);

/// Raises BufferError where a consumer asks for another device or a copy.
void check_request(Device device, const pybind11::object& dl_device, const pybind11::object& copy);

/// A capsule of `bytes` uint8 at `memory`. Who consumes it keeps `owner` until it lets go, on any
/// thread and without the GIL.
pybind11::capsule export_bytes(std::byte* memory, std::int64_t bytes, Device device,
                               std::shared_ptr<const void> owner);

}  // namespace qlora::dlpack
