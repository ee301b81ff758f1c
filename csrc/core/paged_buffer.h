// Memory for optimiser state, of which a device need hold a part at a time: it is cut into pages,
// and a page is on the device while work on it is queued.
//
//   for (std::int64_t page = 0; page < buffer->page_count(); ++page) {
//     std::byte* memory = buffer->begin(page, stream);  // usable by what is queued on `stream` ...
//     launch_some_kernel(memory, buffer->page_range(page).bytes, stream);
//     buffer->end(page, stream);                        // ... up to here
//   }
//   buffer->join(stream);
//
// `begin` also asks for the page after, so that it travels while this one is used. Copies run on
// streams of the buffer's own, which events tie to the caller's; no call waits for the device.
//
// Where all of it may be on the device at once, make_resident says so, and it is used as it lies.
//
// The strategies:
//   ordinary  the CPU's: memory that stays where it is
//   file      the CPU's: a file that is mapped, so that there may be more of it than memory. The
//             memory stands for the device here, and the file for the host
//   managed   CUDA unified memory: one address on host and device. Without a budget the driver
//             decides what stays on the device, and moves pages out as others need the room
//   pinned    page-locked host memory, and two or three pages of device memory that stand in for the
//             pages in use. For devices without managed memory, or that cannot use it while the host
//             does (WSL2, some virtual GPUs), and on request
//
// Managed memory may be larger than what the device has free: that is what it is for. Nothing here
// holds a caller back from it, so a caller who shares a device asks for less, or sets a budget.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "core/tensor_view.h"

namespace qlora {

enum class PagingStrategy : std::uint8_t { automatic, ordinary, file, managed, pinned };

std::ostream& operator<<(std::ostream& stream, PagingStrategy strategy);

struct PagedBufferOptions {
  std::int64_t bytes = 0;

  /// Pages are cut at multiples of this, which is a page of most hosts. Where theirs are larger, as
  /// some hosts' 64 KiB, a page that is no multiple of them moves a bit of its neighbours.
  static constexpr std::int64_t page_unit = std::int64_t{4} << 10;

  /// 16 times the 2 MiB that CUDA's driver moves at once. PCIe 5 takes 0.6 ms for it, some fifty
  /// times what asking for it costs; three pages take 96 MiB of the device.
  std::int64_t page_bytes = std::int64_t{32} << 20;

  /// automatic: managed where the device can, else pinned; on the CPU file where there is a
  /// page_file, else ordinary.
  PagingStrategy strategy = PagingStrategy::automatic;

  /// The most device memory that the buffer asks for at once, of two pages at least. None: pinned
  /// takes three pages, and with managed the driver decides. Of a file: the most memory, where what
  /// is used through data() does not count. None: the kernel decides.
  std::optional<std::int64_t> resident_bytes = std::nullopt;

  /// On the CPU: the directory of the file. It has no name there, and is gone with the buffer, or the
  /// process, however that ends. Its space is reserved at once. (Some file systems write to another
  /// place each time, and reserve in vain: where such a disk fills up, or one cannot be read, a use
  /// of the memory is SIGBUS, which ends the process.)
  std::optional<std::string> page_file = std::nullopt;
};

struct ByteRange {
  std::int64_t offset = 0, bytes = 0;
};

/// Where a page was last asked to be. Where it is only the driver knows: it moves managed pages as
/// it sees fit, and tells nobody.
enum class PagePlace : std::uint8_t { unknown, host, device };

/// What was asked for, in bytes. A request for a page to be where it was asked to be last moves
/// nothing in this account. The zeros of managed memory are written on the device, so that it begins
/// with each page asked there, and those that may not stay asked back.
struct PagedBufferReport {
  std::int64_t unknown_bytes = 0, host_bytes = 0, device_bytes = 0;  // they add up to all
  std::int64_t moved_to_device_bytes = 0, moved_to_host_bytes = 0;   // since the beginning

  /// Of requests, since the beginning, that managed memory's driver had no memory for. The bytes stay
  /// where they are, and are used from there.
  std::int64_t refused_bytes = 0;
};

/// Made by make_paged_buffer, owned by one pointer. Any thread may call; calls take turns. Streams
/// are a cudaStream_t of the buffer's device, or unused on the CPU. A child that a fork made may only
/// destroy it, which frees nothing of the parent's.
///
/// Destroying it waits for its own copies and the work that was queued on its pages. (CUDA's own
/// functions that free may wait for the device besides.)
class PagedBuffer {
 public:
  virtual ~PagedBuffer() = default;
  PagedBuffer(const PagedBuffer&) = delete;
  PagedBuffer& operator=(const PagedBuffer&) = delete;

  Device device() const { return device_; }
  PagingStrategy strategy() const { return strategy_; }
  std::int64_t bytes() const { return bytes_; }
  std::int64_t page_bytes() const { return page_bytes_; }
  std::int64_t page_count() const { return static_cast<std::int64_t>(places_.size()); }

  /// The bytes of a page: the last may be short.
  ByteRange page_range(std::int64_t page) const;

  /// All of the memory, in one piece: zeros, once a stream has joined. The host may use it when no
  /// page is in use and it has waited for a stream that joined. null if there are no bytes.
  virtual std::byte* data() const = 0;

  /// Whether data() is an address of the device, too.
  bool is_addressable_by_device() const { return strategy_ != PagingStrategy::pinned; }

  /// Makes a page usable on the device by what is queued on `stream` between this and `end`, and
  /// returns where it is there: with `pinned` not at the same place each time.
  std::byte* begin(std::int64_t page, void* stream);
  void end(std::int64_t page, void* stream);

  /// Whether what is queued on `stream` from here on may use all of data() at once, on the device,
  /// without begin and end. If so, all of it has been asked for. If not, there is no room, or pages
  /// have no one address on the device.
  ///
  /// Without a budget it depends on what the device has free: room is wanted for all that is not there
  /// yet, of this buffer and of others (`companion_bytes` in all), and for two pages more. A stream
  /// that records a CUDA graph makes no requests: what it records is right wherever the memory is.
  ///
  /// A stream that has used data() so joins, for destroying to wait for that use.
  bool make_resident(void* stream, std::int64_t companion_bytes = 0);

  /// Makes `stream` wait for all copies asked for so far. (One that records a CUDA graph cannot, and
  /// need not where make_resident says so.) Of a file: waits itself, and throws FileError if a page
  /// could not be written out, from then on each time.
  void join(void* stream);

  /// Asks for the pages that the range touches, after what is queued on `stream`, which does not
  /// wait for them. To the device go as many as the budget has room for, the first ones first; a
  /// page in use must not be asked to the host.
  void prefetch_to_device(const ByteRange& range, void* stream);
  void prefetch_to_host(const ByteRange& range, void* stream);

  PagedBufferReport report() const;

 protected:
  PagedBuffer(Device device, PagingStrategy strategy, const PagedBufferOptions& options,
              PagePlace place);

  // With the mutex held, and valid arguments. A page range is [first, last).
  virtual std::byte* do_begin(std::int64_t page, void* stream) = 0;
  virtual void do_end(std::int64_t page, void* stream) = 0;
  virtual bool do_make_resident(void* stream, std::int64_t companion_bytes) = 0;
  virtual void do_join(void* stream) = 0;
  virtual void do_prefetch_to_device(std::int64_t first, std::int64_t last, void* stream) = 0;
  virtual void do_prefetch_to_host(std::int64_t first, std::int64_t last, void* stream) = 0;

  /// Notes a request, or one that was refused.
  void note(std::int64_t page, PagePlace place);
  void note_refusal(std::int64_t bytes) { report_.refused_bytes += bytes; }
  std::int64_t bytes_asked_to_device() const { return report_.device_bytes; }

 private:
  void check_page(std::int64_t page, const char* operation, bool is_in_use) const;
  void check_range(const ByteRange& range, const char* operation) const;

  Device device_;
  PagingStrategy strategy_;
  std::int64_t bytes_, page_bytes_;
  std::vector<PagePlace> places_;
  std::vector<bool> is_in_use_;
  PagedBufferReport report_;
  mutable std::mutex mutex_;
};

/// Throws InvalidArgument, Unsupported for a strategy that the device lacks, OutOfMemory,
/// HostOutOfMemory or FileError; nothing stays allocated then.
std::unique_ptr<PagedBuffer> make_paged_buffer(Device device, const PagedBufferOptions& options);

}  // namespace qlora
