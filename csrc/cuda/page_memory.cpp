#include "cuda/page_memory.h"

#include <algorithm>
#include <cstring>

#include "cuda/owned.h"
#include "cuda/unified_memory.h"

namespace qlora::cuda {
namespace {

std::size_t size_of(std::int64_t bytes) { return static_cast<std::size_t>(bytes); }

OwnedMemory allocate_managed(std::int64_t bytes) {
  void* memory = nullptr;
  check_cuda(cudaMallocManaged(&memory, size_of(bytes), cudaMemAttachGlobal),
             message("PagedBuffer: ", bytes, " bytes of managed memory").c_str());
  return OwnedMemory(static_cast<std::byte*>(memory));
}

OwnedMemory allocate_on_device(std::int64_t bytes) {
  void* memory = nullptr;
  check_cuda(cudaMalloc(&memory, size_of(bytes)),
             message("PagedBuffer: ", bytes, " bytes of device memory").c_str());
  return OwnedMemory(static_cast<std::byte*>(memory));
}

OwnedPinnedMemory allocate_pinned(std::int64_t bytes) {
  const std::string what = message("PagedBuffer: ", bytes, " bytes of pinned host memory");
  void* memory = nullptr;
  const cudaError_t error = cudaHostAlloc(&memory, size_of(bytes), cudaHostAllocPortable);
  if (error == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    throw HostOutOfMemory(what);
  }
  check_cuda(error, what.c_str());
  return OwnedPinnedMemory(static_cast<std::byte*>(memory));
}

class ManagedPages final : public PageMemory {
 public:
  ManagedPages(int device, std::int64_t bytes, std::int64_t guests)
      : device_(device), memory_(allocate_managed(bytes)) {
    const char* const operation = "PagedBuffer: cudaMemAdvise";
    // Keeps the pages in the device's page table wherever they are: one that the driver moved out is
    // then read over the bus, where a fault for each piece of it would stall the kernel. Read-mostly
    // would be wrong, since a step writes all of it.
    check_cuda(advise(data(), size_of(bytes), cudaMemAdviseSetAccessedBy, device_location(device)),
               operation);
    // A stray access does not bring a guest back over the budget. The others have no such advice:
    // whether they stay is the driver's to say.
    if (guests < bytes) {
      check_cuda(advise(data() + guests, size_of(bytes - guests), cudaMemAdviseSetPreferredLocation,
                        host_location()),
                 operation);
    }
  }

  std::byte* data() const override { return memory_.get(); }
  std::byte* on_device(const ByteRange& page, int) const override { return data() + page.offset; }
  bool has_host_copy() const override { return false; }

  bool queue_to_device(const ByteRange& pages, int, cudaStream_t stream) const override {
    return queue(pages, device_location(device_), stream);
  }
  bool queue_to_host(const ByteRange& pages, int, cudaStream_t stream) const override {
    return queue(pages, host_location(), stream);
  }
  void queue_zeros(const ByteRange& page, cudaStream_t stream) const override {
    check_cuda(cudaMemsetAsync(data() + page.offset, 0, size_of(page.bytes), stream),
               "PagedBuffer: cudaMemsetAsync");
  }

 private:
  bool queue(const ByteRange& pages, MemoryLocation location, cudaStream_t stream) const {
    const cudaError_t error =
        prefetch(data() + pages.offset, size_of(pages.bytes), location, stream);
    if (error == cudaErrorMemoryAllocation) {
      cudaGetLastError();  // or the next one to ask would be told of it
      return false;
    }
    check_cuda(error, "PagedBuffer: cudaMemPrefetchAsync");
    return true;
  }

  int device_;
  OwnedMemory memory_;
};

class PinnedPages final : public PageMemory {
 public:
  PinnedPages(std::int64_t bytes, std::int64_t page_bytes, int slots)
      : page_bytes_(page_bytes),
        slots_(allocate_on_device(std::min(bytes, page_bytes * slots))),
        memory_(allocate_pinned(bytes)) {
    std::memset(memory_.get(), 0, size_of(bytes));
  }

  std::byte* data() const override { return memory_.get(); }
  std::byte* on_device(const ByteRange&, int slot) const override {
    return slots_.get() + slot * page_bytes_;
  }
  bool has_host_copy() const override { return true; }

  bool queue_to_device(const ByteRange& page, int slot, cudaStream_t stream) const override {
    check_cuda(cudaMemcpyAsync(on_device(page, slot), data() + page.offset, size_of(page.bytes),
                               cudaMemcpyHostToDevice, stream),
               "PagedBuffer: cudaMemcpyAsync to the device");
    return true;
  }
  bool queue_to_host(const ByteRange& page, int slot, cudaStream_t stream) const override {
    check_cuda(cudaMemcpyAsync(data() + page.offset, on_device(page, slot), size_of(page.bytes),
                               cudaMemcpyDeviceToHost, stream),
               "PagedBuffer: cudaMemcpyAsync to the host");
    return true;
  }
  void queue_zeros(const ByteRange&, cudaStream_t) const override {}

 private:
  std::int64_t page_bytes_;
  OwnedMemory slots_;
  OwnedPinnedMemory memory_;
};

}  // namespace

std::unique_ptr<PageMemory> make_managed_pages(int device, std::int64_t bytes,
                                               std::int64_t guests) {
  return std::make_unique<ManagedPages>(device, bytes, guests);
}

std::unique_ptr<PageMemory> make_pinned_pages(std::int64_t bytes, std::int64_t page_bytes,
                                              int slots) {
  return std::make_unique<PinnedPages>(bytes, page_bytes, slots);
}

}  // namespace qlora::cuda
