// The CPU's PagedBuffer: memory that stays where it is, or a file (cpu/file_paged_buffer.h).
#pragma once

#include "core/paged_buffer.h"

namespace qlora {

std::unique_ptr<PagedBuffer> make_cpu_paged_buffer(Device device,
                                                   const PagedBufferOptions& options);

}  // namespace qlora
