#include "cpu/paged_buffer.h"

#include <cstdlib>
#include <utility>

#include "cpu/file_paged_buffer.h"

namespace qlora {
namespace {

/// Zeros, which take memory when they are first written.
class Memory {
 public:
  explicit Memory(std::int64_t bytes) {
    if (bytes == 0) return;
    allocated_.reset(std::calloc(static_cast<std::size_t>(bytes) + alignment, 1));
    if (!allocated_) {
      throw HostOutOfMemory(message("PagedBuffer: no ", bytes, " bytes of host memory"));
    }
  }

  std::byte* data() const {
    if (!allocated_) return nullptr;
    auto* const begin = static_cast<std::byte*>(allocated_.get());
    return begin + (alignment - reinterpret_cast<std::uintptr_t>(begin) % alignment) % alignment;
  }

 private:
  static constexpr auto alignment = static_cast<std::size_t>(PagedBufferOptions::page_unit);
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  std::unique_ptr<void, Free> allocated_;
};

class CpuPagedBuffer final : public PagedBuffer {
 public:
  CpuPagedBuffer(Device device, const PagedBufferOptions& options, Memory memory)
      : PagedBuffer(device, PagingStrategy::ordinary, options, PagePlace::host),
        memory_(std::move(memory)) {}

  std::byte* data() const override { return memory_.data(); }

 private:
  std::byte* do_begin(std::int64_t page, void*) override {
    return memory_.data() + page_range(page).offset;
  }
  // The host is the device: nothing moves.
  void do_end(std::int64_t, void*) override {}
  bool do_make_resident(void*, std::int64_t) override { return true; }
  void do_join(void*) override {}
  void do_prefetch_to_device(std::int64_t, std::int64_t, void*) override {}
  void do_prefetch_to_host(std::int64_t, std::int64_t, void*) override {}

  Memory memory_;
};

}  // namespace

std::unique_ptr<PagedBuffer> make_cpu_paged_buffer(Device device,
                                                   const PagedBufferOptions& options) {
  switch (options.strategy) {
    case PagingStrategy::automatic: break;
    case PagingStrategy::ordinary:
      check(!options.page_file,
            "PagedBuffer: page_file is for strategy file, but strategy is ordinary");
      break;
    case PagingStrategy::file:
      check(options.page_file.has_value(),
            "PagedBuffer: strategy is file, but there is no page_file, the directory of the file");
      break;
    case PagingStrategy::managed:
    case PagingStrategy::pinned:
      throw InvalidArgument(message("PagedBuffer: strategy is ", options.strategy,
                                    ", on the CPU want automatic, ordinary or file"));
  }
  if (options.page_file) return make_file_paged_buffer(device, options);
  check(!options.resident_bytes,
        "PagedBuffer: resident_bytes is for a device beside the host, or for a file; on the CPU "
        "give page_file too, or leave it out");
  return std::make_unique<CpuPagedBuffer>(device, options, Memory(options.bytes));
}

}  // namespace qlora
