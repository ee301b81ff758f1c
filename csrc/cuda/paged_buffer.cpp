#include "cuda/paged_buffer.h"

#include <algorithm>

#include "cuda/owned.h"
#include "cuda/page_memory.h"
#include "cuda/paging_plan.h"

namespace qlora::cuda {
namespace {

class CudaPagedBuffer final : public PagedBuffer {
 public:
  CudaPagedBuffer(Device device, const PagedBufferOptions& options, const PagingPlan& plan,
                  std::unique_ptr<PageMemory> memory)
      : PagedBuffer(device, plan.strategy, options,
                    plan.strategy == PagingStrategy::pinned ? PagePlace::host : PagePlace::unknown),
        memory_(std::move(memory)),
        staying_pages_(plan.staying_pages),
        has_budget_(plan.has_budget),
        coming_(make_stream(name)),
        going_(make_stream(name)),
        link_(make_event(name)),
        zeroed_(make_event(name)) {
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

  /// Queues the first zeros of managed memory: a walk over its pages, before any other use. Not in the
  /// constructor, so that the destructor waits for what was queued if a call fails.
  void queue_zeros() {
    if (strategy() != PagingStrategy::managed) return;
    for (std::int64_t page = 0; page < page_count(); ++page) {
      load(page);
      memory_->queue_zeros(page_range(page), coming_.get());
      Slot& slot = slot_of(page);
      record(slot.loaded, coming_.get());
      if (is_guest(page)) send_back_unused(slot);
      slot.state = Slot::State::empty;
    }
    record(zeroed_, coming_.get());
  }

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
        : guard_(buffer.checked_device(operation), operation),
          operation_(operation),
          stream_(to_stream(stream)) {
      check_stream(stream_, operation_);
    }

    void refuse_capture() const {
      cuda::refuse_capture(
          stream_, operation_,
          "pages move from one launch to the next, which a graph would not repeat");
    }

   private:
    DeviceGuard guard_;
    const char* operation_;
    cudaStream_t stream_;
  };

  Device checked_device(const char* operation) const {
    if (getpid() == owner_) return device();
    throw Unsupported(message(operation,
                              ": this process was forked from the one that made the buffer, and "
                              "CUDA does not follow"));
  }

  std::byte* do_begin(std::int64_t page, void* stream) override {
    const Entry entry(*this, "PagedBuffer.begin", stream);
    entry.refuse_capture();
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
    entry.refuse_capture();
    Slot& slot = slot_of(page);
    record(slot.used, to_stream(stream));
    if (is_guest(page)) {
      wait(going_.get(), slot.used);
      save(slot);
    }
    slot.state = Slot::State::empty;
  }

  bool do_make_resident(void* stream, std::int64_t companion_bytes) override {
    const Entry entry(*this, "PagedBuffer.make_resident", stream);
    if (!may_be_resident()) return false;
    if (page_count() == 0) return true;
    if (is_capturing(to_stream(stream), "PagedBuffer.make_resident")) {
      // A graph cannot wait for what is queued outside of it: these zeros.
      const RelaxedCapture relaxed;
      check_cuda(cudaEventSynchronize(zeroed_.get()), name);
      return true;
    }
    if (!has_budget_ && !has_room(companion_bytes)) return false;
    order(going_.get(), coming_.get());
    // Also what was asked before, to bring back what the driver has moved out since; and beside what
    // the caller's stream still does, which may use the pages as they move.
    const bool is_asked = ask(PagePlace::device, 0, page_count());
    order(coming_.get(), to_stream(stream));
    return is_asked;
  }

  void do_join(void* stream) override {
    const Entry entry(*this, "PagedBuffer.join", stream);
    if (may_be_resident() && is_capturing(to_stream(stream), "PagedBuffer.join")) return;
    entry.refuse_capture();
    order(coming_.get(), to_stream(stream));
    order(going_.get(), to_stream(stream));
    if (may_be_resident()) order(to_stream(stream), going_.get());  // the destructor waits for it
    if (memory_ && memory_->has_host_copy()) forget_loaded();
  }

  /// The host may write to its copy when a stream has joined: what came ahead of its use is old then.
  void forget_loaded() {
    for (Slot& slot : slots_) {
      if (slot.state != Slot::State::loaded) continue;
      note(slot.page, PagePlace::host);
      slot.state = Slot::State::empty;
    }
  }

  void do_prefetch_to_device(std::int64_t first, std::int64_t last, void* stream) override {
    const Entry entry(*this, "PagedBuffer.prefetch_to_device", stream);
    entry.refuse_capture();
    order(to_stream(stream), coming_.get());
    const std::int64_t first_guest = std::clamp(staying_pages_, first, last);
    if (first < first_guest) ask(PagePlace::device, first, first_guest);
    for (std::int64_t page = first_guest; page < last; ++page) {
      const Slot& slot = slot_of(page);
      if (slot.state != Slot::State::empty && slot.page != page) break;  // no room beyond
      if (slot.state == Slot::State::empty) load(page);
    }
  }

  void do_prefetch_to_host(std::int64_t first, std::int64_t last, void* stream) override {
    const Entry entry(*this, "PagedBuffer.prefetch_to_host", stream);
    entry.refuse_capture();
    for (Slot& slot : slots_) {
      if (slot.state == Slot::State::loaded && slot.page >= first && slot.page < last) {
        slot.state = Slot::State::empty;
      }
    }
    if (!memory_->has_host_copy()) {
      order(to_stream(stream), going_.get());
      order(coming_.get(), going_.get());
      ask(PagePlace::host, first, last);
      order(going_.get(), coming_.get());
    } else {
      for (std::int64_t page = first; page < last; ++page) note(page, PagePlace::host);
    }
  }

  /// Whether all pages may be on the device at once, where they have one address.
  bool may_be_resident() const {
    return strategy() == PagingStrategy::managed && staying_pages_ == page_count();
  }

  bool is_zeroed() const {
    const cudaError_t error = cudaEventQuery(zeroed_.get());
    if (error == cudaErrorNotReady) {
      cudaGetLastError();  // or the next one to ask would be told of it
      return false;
    }
    check_cuda(error, name);
    return true;
  }

  /// Whether the device has room for what is not there yet, of this buffer and as large a share of
  /// its companions.
  bool has_room(std::int64_t companion_bytes) const {
    const RelaxedCapture relaxed;
    std::size_t free = 0, total = 0;
    check_cuda(cudaMemGetInfo(&free, &total), "PagedBuffer: cudaMemGetInfo");
    // Pages that were asked to come are not all there before they are zeros.
    const std::int64_t missing = is_zeroed() ? bytes() - bytes_asked_to_device() : bytes();
    const double with_companions =
        static_cast<double>(bytes() + companion_bytes) / static_cast<double>(bytes());
    const auto spare = static_cast<double>(2 * page_bytes());
    return with_companions * static_cast<double>(missing) + spare <= static_cast<double>(free) &&
           with_companions * static_cast<double>(bytes()) + spare <= static_cast<double>(total);
  }

  /// Queues a request for pages, and notes it. That the driver refuses it is no error: a kernel then
  /// reads pages of managed memory over the bus, and no step ends in its middle.
  bool ask(PagePlace place, std::int64_t first, std::int64_t last, int slot = 0) {
    const ByteRange range = pages_range(first, last);
    const bool is_taken = place == PagePlace::device
                              ? memory_->queue_to_device(range, slot, coming_.get())
                              : memory_->queue_to_host(range, slot, going_.get());
    if (!is_taken) note_refusal(range.bytes);
    for (std::int64_t page = first; is_taken && page < last; ++page) note(page, place);
    return is_taken;
  }

  /// Brings a page to its slot, unless it is there: no page in use is.
  void load(std::int64_t page) {
    Slot& slot = slot_of(page);
    if (slot.state == Slot::State::loaded && slot.page == page) return;
    if (slot.state == Slot::State::loaded && is_guest(slot.page)) send_back_unused(slot);
    slot.state = Slot::State::empty;
    wait(coming_.get(), slot.saved);
    // Also a page that was asked to stay: the driver may have moved it out since.
    ask(PagePlace::device, page, page + 1, slot_index(page));
    record(slot.loaded, coming_.get());
    slot.page = page;
    slot.state = Slot::State::loaded;
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
    ask(PagePlace::host, slot.page, slot.page + 1, slot_index(slot.page));
    record(slot.saved, going_.get());
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
  bool has_budget_;
  OwnedStream coming_, going_;
  OwnedEvent link_, zeroed_;
  std::vector<Slot> slots_;
};

}  // namespace

std::unique_ptr<PagedBuffer> make_cuda_paged_buffer(Device device,
                                                    const PagedBufferOptions& options) {
  const DeviceGuard guard(device, "PagedBuffer");
  const RelaxedCapture relaxed;
  const PagingPlan plan = make_paging_plan(device, options);
  std::unique_ptr<PageMemory> memory;
  if (options.bytes > 0) {
    memory =
        plan.strategy == PagingStrategy::managed
            ? make_managed_pages(device.index, options.bytes,
                                 std::min(plan.staying_pages * options.page_bytes, options.bytes))
            : make_pinned_pages(options.bytes, options.page_bytes, plan.slot_count);
  }
  auto buffer = std::make_unique<CudaPagedBuffer>(device, options, plan, std::move(memory));
  buffer->queue_zeros();
  return buffer;
}

}  // namespace qlora::cuda
