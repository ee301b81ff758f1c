// The memory of a PagedBuffer, and how a piece of it moves: what the two strategies differ in.
#pragma once

#include <memory>

#include <cuda_runtime_api.h>

#include "core/paged_buffer.h"

namespace qlora::cuda {

class PageMemory {
 public:
  virtual ~PageMemory() = default;

  /// All of it, where the host sees it.
  virtual std::byte* data() const = 0;

  /// Where a page is on the device, while it is in `slot`.
  virtual std::byte* on_device(const ByteRange& page, int slot) const = 0;

  /// Queue a move. Managed pages have no slots, and may move many at once; false, if the driver has no
  /// memory for it: they stay where they are, and are used from there.
  virtual bool queue_to_device(const ByteRange& pages, int slot, cudaStream_t stream) const = 0;
  virtual bool queue_to_host(const ByteRange& pages, int slot, cudaStream_t stream) const = 0;

  /// Queues zeros in a page that is on the device. Pinned pages are zeros from the beginning.
  virtual void queue_zeros(const ByteRange& page, cudaStream_t stream) const = 0;

  /// Whether the host keeps a copy of a page that is on the device, so that one which nobody wrote
  /// need not be sent back.
  virtual bool has_host_copy() const = 0;
};

/// Memory of cudaMallocManaged. The pages from `guests` on, in bytes, are on the device for a time
/// only.
std::unique_ptr<PageMemory> make_managed_pages(int device, std::int64_t bytes, std::int64_t guests);

/// Pinned memory, and `slots` pages of device memory, which is all of it if they hold that much.
std::unique_ptr<PageMemory> make_pinned_pages(std::int64_t bytes, std::int64_t page_bytes,
                                              int slots);

}  // namespace qlora::cuda
