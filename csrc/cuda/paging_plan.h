// How a PagedBuffer of the CUDA backend goes about its pages: what its options come to on a device.
#pragma once

#include "core/paged_buffer.h"

namespace qlora::cuda {

struct PagingPlan {
  PagingStrategy strategy;     // managed or pinned
  int slot_count;              // of the pages in use, coming and going
  std::int64_t staying_pages;  // the first so many stay on the device
  bool has_budget;
};

/// Throws InvalidArgument or Unsupported for a strategy that the device lacks.
PagingPlan make_paging_plan(Device device, const PagedBufferOptions& options);

}  // namespace qlora::cuda
