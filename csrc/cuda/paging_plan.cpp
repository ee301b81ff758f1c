#include "cuda/paging_plan.h"

#include <algorithm>

#include "cuda/runtime.h"
#include "format/nf4_layout.h"

namespace qlora::cuda {
namespace {

bool has_concurrent_managed_memory(int device) {
  const auto ask = [&](cudaDeviceAttr attribute) {
    int value = 0;
    check_cuda(cudaDeviceGetAttribute(&value, attribute, device), "PagedBuffer");
    return value != 0;
  };
  return ask(cudaDevAttrManagedMemory) && ask(cudaDevAttrConcurrentManagedAccess);
}

PagingStrategy choose_strategy(Device device, PagingStrategy asked) {
  switch (asked) {
    case PagingStrategy::pinned: return asked;
    case PagingStrategy::automatic:
      return has_concurrent_managed_memory(device.index) ? PagingStrategy::managed
                                                         : PagingStrategy::pinned;
    case PagingStrategy::managed:
      if (has_concurrent_managed_memory(device.index)) return asked;
      throw Unsupported(message("PagedBuffer: ", device,
                                " has no managed memory that the host can use at the same time (so "
                                "with WSL2 and some virtual GPUs); use strategy pinned"));
    case PagingStrategy::ordinary:
    case PagingStrategy::file: break;
  }
  throw InvalidArgument(message("PagedBuffer: strategy is ", asked, ", on ", device,
                                " want automatic, managed or pinned"));
}

}  // namespace

PagingPlan make_paging_plan(Device device, const PagedBufferOptions& options) {
  constexpr std::int64_t max_slots = 3;  // in use, coming, going
  const PagingStrategy strategy = choose_strategy(device, options.strategy);
  const std::int64_t page_count = ceil_divide(options.bytes, options.page_bytes);
  const bool has_room_for_all =
      options.resident_bytes ? *options.resident_bytes >= options.bytes : true;
  const std::int64_t room =
      has_room_for_all ? page_count : *options.resident_bytes / options.page_bytes;
  const std::int64_t slots = std::min(max_slots, room);
  std::int64_t staying = 0;
  if (strategy == PagingStrategy::managed) staying = has_room_for_all ? page_count : room - slots;
  return {strategy, static_cast<int>(slots), staying, options.resident_bytes.has_value()};
}

}  // namespace qlora::cuda
