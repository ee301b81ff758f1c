#include "cpu/paged_buffer.h"

#include <cstdlib>
#include <utility>

namespace qlora {
namespace {

struct Free {
  void operator()(std::byte* memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<std::byte, Free>;

Memory allocate(std::int64_t bytes) {
  if (bytes == 0) return nullptr;
  constexpr auto alignment = static_cast<std::size_t>(PagedBufferOptions::page_unit);
  const std::size_t rounded =
      (static_cast<std::size_t>(bytes) + alignment - 1) / alignment * alignment;
  Memory memory(static_cast<std::byte*>(std::aligned_alloc(alignment, rounded)));
  if (!memory) throw HostOutOfMemory(message("PagedBuffer: no ", bytes, " bytes of host memory"));
  return memory;
}

class CpuPagedBuffer final : public PagedBuffer {
 public:
  CpuPagedBuffer(Device device, const PagedBufferOptions& options, Memory memory)
      : PagedBuffer(device, PagingStrategy::ordinary, options, PagePlace::host),
        memory_(std::move(memory)) {}

  std::byte* data() const override { return memory_.get(); }

 private:
  std::byte* do_begin(std::int64_t page, void*) override {
    return memory_.get() + page_range(page).offset;
  }
  // The host is the device: nothing moves.
  void do_end(std::int64_t, void*) override {}
  void do_join(void*) override {}
  void do_prefetch_to_device(std::int64_t, std::int64_t, void*) override {}
  void do_prefetch_to_host(std::int64_t, std::int64_t, void*) override {}

  Memory memory_;
};

}  // namespace

std::unique_ptr<PagedBuffer> make_cpu_paged_buffer(Device device,
                                                   const PagedBufferOptions& options) {
  check(
      options.strategy == PagingStrategy::automatic || options.strategy == PagingStrategy::ordinary,
      "PagedBuffer: strategy is ", options.strategy, ", on the CPU want ordinary");
  check(!options.resident_bytes,
        "PagedBuffer: resident_bytes is for a device beside the host; on the CPU leave it out");
  return std::make_unique<CpuPagedBuffer>(device, options, allocate(options.bytes));
}

}  // namespace qlora
