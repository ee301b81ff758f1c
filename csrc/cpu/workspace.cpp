#include "cpu/workspace.h"

#include <sys/mman.h>

#include <array>
#include <cstdlib>
#include <memory>
#include <new>

namespace qlora {
namespace {

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

struct Buffer {
  std::unique_ptr<void, Free> memory;
  std::size_t bytes = 0;
};

constexpr std::size_t page_bytes = 4096, huge_page_bytes = std::size_t{2} << 20;

}  // namespace

void* thread_workspace(Workspace purpose, std::size_t bytes) {
  thread_local std::array<Buffer, workspace_count> buffers;
  Buffer& buffer = buffers[static_cast<std::size_t>(purpose)];
  if (buffer.bytes < bytes || !buffer.memory) {
    buffer.memory.reset();  // or the old and the new would exist at once
    buffer.bytes = 0;
    const std::size_t alignment = bytes < huge_page_bytes ? page_bytes : huge_page_bytes;
    const std::size_t rounded = (bytes / alignment + 1) * alignment;  // never 0
    buffer.memory.reset(std::aligned_alloc(alignment, rounded));
    if (!buffer.memory) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
    if (alignment == huge_page_bytes) madvise(buffer.memory.get(), rounded, MADV_HUGEPAGE);
#endif
    buffer.bytes = rounded;
  }
  return buffer.memory.get();
}

}  // namespace qlora
