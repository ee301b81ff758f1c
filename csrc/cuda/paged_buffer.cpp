#include "cuda/paged_buffer.h"

#include <algorithm>

#include "cuda/owned.h"
#include "cuda/page_memory.h"
#include "format/nf4_layout.h"

namespace qlora::cuda {
namespace {

/// How many pages have a slot, and how many stay on the device for good.
struct Plan {
  PagingStrategy strategy;
  int slot_count;
  std::int64_t staying_pages;
};

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

Plan make_plan(Device device, const PagedBufferOptions& options) {
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
  return {strategy, static_cast<int>(slots), staying};
}

class CudaPagedBuffer final : public PagedBuffer {
 public:
  CudaPagedBuffer(Device device, const PagedBufferOptions& options, const Plan& plan,
                  std::unique_ptr<PageMemory> memory)
      : PagedBuffer(device, plan.strategy, options,
                    plan.strategy == PagingStrategy::pinned ? PagePlace::host : PagePlace::unknown),
        memory_(std::move(memory)),
        staying_pages_(plan.staying_pages),
        coming_(make_stream(name)),
        going_(make_stream(name)),
        link_(make_event(name)) {
    for (int i = 0; i < plan.slot_count; ++i) {
      slots_.push_back(
          {.loaded = make_event(name), .used = make_event(name), .saved = make_event(name)});
    }
  }

  ~CudaPagedBuffer() override {
    if (getpid() != owner_) return;
    const RelaxedCapture relaxed;
    // What fails here has failed, or will, where the caller can see it.
    for (const Slot& slot : slots_) cudaEventSynchronize(slot.used.get());
    cudaStreamSynchronize(coming_.get());
    cudaStreamSynchronize(going_.get());
  }

  std::byte* data() const override { return memory_ ? memory_->data() : nullptr; }

 private:
  static constexpr const char* name = "PagedBuffer";

  struct Slot {
    enum class State { empty, loaded, in_use };
    State state = State::empty;
    std::int64_t page = -1;
    OwnedEvent loaded, used, saved;  // an event that was never recorded holds nobody up
  };

  /// Every use of the buffer: in the process that made it, on its device, on a stream that can take
  /// copies.
  class Entry {
   public:
    Entry(const CudaPagedBuffer& buffer, const char* operation, void* stream)
        : guard_(buffer.checked_device(operation), operation) {
      check_stream(to_stream(stream), operation);
      refuse_capture(to_stream(stream), operation,
                     "pages move from one launch to the next, which a graph would not repeat");
    }

   private:
    DeviceGuard guard_;
  };

  Device checked_device(const char* operation) const {
    if (getpid() == owner_) return device();
    throw Unsupported(message(operation,
                              ": this process was forked from the one that made the buffer, and "
                              "CUDA does not follow"));
  }

  std::byte* do_begin(std::int64_t page, void* stream) override {
    const Entry entry(*this, "PagedBuffer.begin", stream);
    Slot& slot = slot_of(page);
    check(slot.state != Slot::State::in_use, "PagedBuffer.begin: page ", page,
          " needs the room of page ", slot.page, ", which is in use; at most ", slots_.size(),
          " pages, one after the other, are in use at once");
    order(to_stream(stream), coming_.get());
    load(page);
    if (page + 1 < page_count() && slot_of(page + 1).state != Slot::State::in_use &&
        &slot_of(page + 1) != &slot) {
      load(page + 1);
    }
    wait(to_stream(stream), slot.loaded);
    slot.state = Slot::State::in_use;
    return memory_->on_device(page_range(page), slot_index(page));
  }

  void do_end(std::int64_t page, void* stream) override {
    const Entry entry(*this, "PagedBuffer.end", stream);
    Slot& slot = slot_of(page);
    record(slot.used, to_stream(stream));
    if (is_guest(page)) {
      wait(going_.get(), slot.used);
      save(slot);
    }
    slot.state = Slot::State::empty;
  }

  bool do_make_resident(void*, std::int64_t) override { return false; }

  void do_join(void* stream) override {
    const Entry entry(*this, "PagedBuffer.join", stream);
    order(coming_.get(), to_stream(stream));
    order(going_.get(), to_stream(stream));
  }

  void do_prefetch_to_device(std::int64_t first, std::int64_t last, void* stream) override {
    const Entry entry(*this, "PagedBuffer.prefetch_to_device", stream);
    order(to_stream(stream), coming_.get());
    const std::int64_t first_guest = std::clamp(staying_pages_, first, last);
    if (first < first_guest) {
      memory_->queue_to_device(pages_range(first, first_guest), 0, coming_.get());
      for (std::int64_t page = first; page < first_guest; ++page) note(page, PagePlace::device);
    }
    for (std::int64_t page = first_guest; page < last; ++page) {
      const Slot& slot = slot_of(page);
      if (slot.state != Slot::State::empty && slot.page != page) break;  // no room beyond
      if (slot.state == Slot::State::empty) load(page);
    }
  }

  void do_prefetch_to_host(std::int64_t first, std::int64_t last, void* stream) override {
    const Entry entry(*this, "PagedBuffer.prefetch_to_host", stream);
    for (Slot& slot : slots_) {
      if (slot.state == Slot::State::loaded && slot.page >= first && slot.page < last) {
        slot.state = Slot::State::empty;
      }
    }
    if (!memory_->has_host_copy()) {
      order(to_stream(stream), going_.get());
      order(coming_.get(), going_.get());
      memory_->queue_to_host(pages_range(first, last), 0, going_.get());
      order(going_.get(), coming_.get());
    }
    for (std::int64_t page = first; page < last; ++page) note(page, PagePlace::host);
  }

  /// Brings a page to its slot, unless it is there: no page in use is.
  void load(std::int64_t page) {
    Slot& slot = slot_of(page);
    if (slot.state == Slot::State::loaded && slot.page == page) return;
    if (slot.state == Slot::State::loaded && is_guest(slot.page)) send_back_unused(slot);
    slot.state = Slot::State::empty;
    wait(coming_.get(), slot.saved);
    // Also a page that was asked to stay: the driver may have moved it out since.
    memory_->queue_to_device(page_range(page), slot_index(page), coming_.get());
    record(slot.loaded, coming_.get());
    slot.page = page;
    slot.state = Slot::State::loaded;
    note(page, PagePlace::device);
  }

  void send_back_unused(Slot& slot) {
    if (memory_->has_host_copy()) {
      note(slot.page, PagePlace::host);
    } else {
      wait(going_.get(), slot.loaded);
      save(slot);
    }
  }

  void save(Slot& slot) {
    memory_->queue_to_host(page_range(slot.page), slot_index(slot.page), going_.get());
    record(slot.saved, going_.get());
    note(slot.page, PagePlace::host);
  }

  /// What is queued on `second` from here on waits for what is on `first`.
  void order(cudaStream_t first, cudaStream_t second) const {
    record(link_, first);
    wait(second, link_);
  }
  static void record(const OwnedEvent& event, cudaStream_t stream) {
    check_cuda(cudaEventRecord(event.get(), stream), name);
  }
  static void wait(cudaStream_t stream, const OwnedEvent& event) {
    check_cuda(cudaStreamWaitEvent(stream, event.get(), 0), name);
  }

  static cudaStream_t to_stream(void* stream) { return static_cast<cudaStream_t>(stream); }
  bool is_guest(std::int64_t page) const { return page >= staying_pages_; }
  int slot_index(std::int64_t page) const {
    return static_cast<int>(page % static_cast<std::int64_t>(slots_.size()));
  }
  Slot& slot_of(std::int64_t page) { return slots_[static_cast<std::size_t>(slot_index(page))]; }
  ByteRange pages_range(std::int64_t first, std::int64_t last) const {
    const ByteRange begin = page_range(first), end = page_range(last - 1);
    return {begin.offset, end.offset + end.bytes - begin.offset};
  }

  pid_t owner_ = getpid();
  std::unique_ptr<PageMemory> memory_;  // null if there are no bytes
  std::int64_t staying_pages_;
  OwnedStream coming_, going_;
  OwnedEvent link_;
  std::vector<Slot> slots_;
};

}  // namespace

std::unique_ptr<PagedBuffer> make_cuda_paged_buffer(Device device,
                                                    const PagedBufferOptions& options) {
  const DeviceGuard guard(device, "PagedBuffer");
  const RelaxedCapture relaxed;
  const Plan plan = make_plan(device, options);
  std::unique_ptr<PageMemory> memory;
  if (options.bytes > 0) {
    memory =
        plan.strategy == PagingStrategy::managed
            ? make_managed_pages(device.index, options.bytes,
                                 std::min(plan.staying_pages * options.page_bytes, options.bytes))
            : make_pinned_pages(options.bytes, options.page_bytes, plan.slot_count);
  }
  return std::make_unique<CudaPagedBuffer>(device, options, plan, std::move(memory));
}

}  // namespace qlora::cuda
