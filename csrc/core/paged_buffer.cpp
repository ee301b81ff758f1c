#include "core/paged_buffer.h"

#include <algorithm>

#include "core/backend.h"
#include "format/nf4_layout.h"

namespace qlora {

std::ostream& operator<<(std::ostream& stream, PagingStrategy strategy) {
  switch (strategy) {
    case PagingStrategy::automatic: return stream << "automatic";
    case PagingStrategy::ordinary: return stream << "ordinary";
    case PagingStrategy::file: return stream << "file";
    case PagingStrategy::managed: return stream << "managed";
    case PagingStrategy::pinned: return stream << "pinned";
  }
  return stream << "unknown";
}

std::unique_ptr<PagedBuffer> make_paged_buffer(Device device, const PagedBufferOptions& options) {
  const char* const operation = "PagedBuffer";
  constexpr std::int64_t max_bytes = std::int64_t{1} << 60;  // leaves room for arithmetic
  check(options.bytes >= 0 && options.bytes <= max_bytes, operation, ": bytes is ", options.bytes,
        ", want 0 to ", max_bytes);
  check(options.page_bytes > 0 && options.page_bytes <= max_bytes &&
            options.page_bytes % PagedBufferOptions::page_unit == 0,
        operation, ": page_bytes is ", options.page_bytes, ", want a positive multiple of ",
        PagedBufferOptions::page_unit);
  if (options.resident_bytes) {
    check(*options.resident_bytes >= std::min(options.bytes, 2 * options.page_bytes), operation,
          ": resident_bytes is ", *options.resident_bytes, ", want at least two pages of ",
          options.page_bytes, " bytes: the one in use and the one that comes");
  }
  if (options.page_file) {
    check(device.type == DeviceType::cpu, operation, ": page_file is for the CPU, but device is ",
          device);
    check(options.page_file->find('\0') == std::string::npos, operation,
          ": page_file holds a null character, want the path of a directory");
  }
  return backend_for(device).make_paged_buffer(device, options);
}

PagedBuffer::PagedBuffer(Device device, PagingStrategy strategy, const PagedBufferOptions& options,
                         PagePlace place)
    : device_(device),
      strategy_(strategy),
      bytes_(options.bytes),
      page_bytes_(options.page_bytes),
      places_(static_cast<std::size_t>(ceil_divide(options.bytes, options.page_bytes)), place),
      is_in_use_(places_.size()) {
  (place == PagePlace::host ? report_.host_bytes : report_.unknown_bytes) = bytes_;
}

ByteRange PagedBuffer::page_range(std::int64_t page) const {
  const std::int64_t offset = page * page_bytes_;
  return {offset, std::min(page_bytes_, bytes_ - offset)};
}

std::byte* PagedBuffer::begin(std::int64_t page, void* stream) {
  const std::lock_guard lock(mutex_);
  check_page(page, "begin", false);
  std::byte* const memory = do_begin(page, stream);
  is_in_use_[static_cast<std::size_t>(page)] = true;
  return memory;
}

void PagedBuffer::end(std::int64_t page, void* stream) {
  const std::lock_guard lock(mutex_);
  check_page(page, "end", true);
  do_end(page, stream);
  is_in_use_[static_cast<std::size_t>(page)] = false;
}

bool PagedBuffer::make_resident(void* stream, std::int64_t companion_bytes) {
  const std::lock_guard lock(mutex_);
  for (std::int64_t page = 0; page < page_count(); ++page) {
    check_page(page, "make_resident", false);
  }
  return do_make_resident(stream, companion_bytes);
}

void PagedBuffer::join(void* stream) {
  const std::lock_guard lock(mutex_);
  do_join(stream);
}

void PagedBuffer::prefetch_to_device(const ByteRange& range, void* stream) {
  const std::lock_guard lock(mutex_);
  check_range(range, "prefetch_to_device");
  if (range.bytes == 0) return;
  do_prefetch_to_device(range.offset / page_bytes_,
                        ceil_divide(range.offset + range.bytes, page_bytes_), stream);
}

void PagedBuffer::prefetch_to_host(const ByteRange& range, void* stream) {
  const std::lock_guard lock(mutex_);
  check_range(range, "prefetch_to_host");
  if (range.bytes == 0) return;
  const std::int64_t first = range.offset / page_bytes_;
  const std::int64_t last = ceil_divide(range.offset + range.bytes, page_bytes_);
  for (std::int64_t page = first; page < last; ++page) check_page(page, "prefetch_to_host", false);
  do_prefetch_to_host(first, last, stream);
}

PagedBufferReport PagedBuffer::report() const {
  const std::lock_guard lock(mutex_);
  return report_;
}

void PagedBuffer::note(std::int64_t page, PagePlace place) {
  PagePlace& noted = places_[static_cast<std::size_t>(page)];
  if (noted == place) return;
  const auto bytes_at = [&](PagePlace where) -> std::int64_t& {
    switch (where) {
      case PagePlace::host: return report_.host_bytes;
      case PagePlace::device: return report_.device_bytes;
      default: return report_.unknown_bytes;
    }
  };
  const std::int64_t bytes = page_range(page).bytes;
  bytes_at(noted) -= bytes;
  bytes_at(place) += bytes;
  (place == PagePlace::device ? report_.moved_to_device_bytes : report_.moved_to_host_bytes) +=
      bytes;
  noted = place;
}

void PagedBuffer::check_page(std::int64_t page, const char* operation, bool is_in_use) const {
  check(page >= 0 && page < page_count(), "PagedBuffer.", operation, ": page is ", page,
        ", want 0 to ", page_count() - 1);
  check(is_in_use_[static_cast<std::size_t>(page)] == is_in_use, "PagedBuffer.", operation,
        ": page ", page, is_in_use ? " is not in use; begin it first" : " is in use; end it first");
}

void PagedBuffer::check_range(const ByteRange& range, const char* operation) const {
  check(range.offset >= 0 && range.bytes >= 0 && range.bytes <= bytes_ &&
            range.offset <= bytes_ - range.bytes,
        "PagedBuffer.", operation, ": the range is ", range.bytes, " bytes from ", range.offset,
        " on, want a part of the ", bytes_, " bytes");
}

}  // namespace qlora
