#include "core/paged_state.h"

#include <algorithm>
#include <exception>

#include "format/nf4_layout.h"

namespace qlora {
namespace {

constexpr const char* name = "PagedState";

/// Pages are multiples of 2 MiB of codes, which is what CUDA's driver moves at once; smaller ones, of
/// what cuts the plane with the fewest bytes at PagedBuffer's unit and a kernel's chunk of 4096
/// elements is whole in.
std::int64_t round_page_blocks(std::int64_t blocks, bool is_8bit) {
  constexpr std::int64_t large = (std::int64_t{2} << 20) / state_block_size;
  constexpr std::int64_t scales_per_unit = PagedBufferOptions::page_unit / 4;
  const std::int64_t unit = blocks >= large ? large : is_8bit ? scales_per_unit : 16;
  return blocks / unit * unit;
}

/// Returns what `function` throws.
template <typename Function>
std::exception_ptr try_to(Function&& function) noexcept {
  try {
    function();
    return nullptr;
  } catch (...) {
    return std::current_exception();
  }
}

}  // namespace

PagedState::PagedState(Device device, OptimizerRule rule, bool is_8bit,
                       const PagedStateOptions& options)
    : device_(device), rule_(rule), is_8bit_(is_8bit), elements_(options.elements) {
  constexpr std::int64_t max_elements = std::int64_t{1} << 56;
  check(elements_ >= 0 && elements_ <= max_elements, name, ": elements is ", elements_,
        ", want 0 to ", max_elements);
  for (int moment = 0; moment < (rule == OptimizerRule::adamw ? 2 : 1); ++moment) {
    const DType dtype = is_8bit ? DType::uint8 : DType::float32;
    planes_.push_back({dtype, state_block_size * element_bytes(dtype), nullptr});
    if (is_8bit) planes_.push_back({DType::float32, element_bytes(DType::float32), nullptr});
  }
  const std::int64_t page_blocks =
      round_page_blocks(options.page_bytes / bytes_per_block(), is_8bit);
  check(page_blocks > 0, name, ": page_bytes is ", options.page_bytes, ", want at least ",
        (is_8bit ? PagedBufferOptions::page_unit / 4 : 16) * bytes_per_block());
  page_elements_ = page_blocks * state_block_size;
  const std::int64_t blocks = ceil_divide(elements_, state_block_size);
  std::optional<std::int64_t> resident_blocks;
  if (options.resident_bytes) {
    resident_blocks = *options.resident_bytes / bytes_per_block();
    check(*resident_blocks >= std::min(blocks, 2 * page_blocks), name, ": resident_bytes is ",
          *options.resident_bytes, ", want at least ",
          std::min(blocks, 2 * page_blocks) * bytes_per_block(),
          ", two pages: the one in use and the one that comes");
  }
  for (Plane& plane : planes_) {
    PagedBufferOptions of_plane{.bytes = blocks * plane.bytes_per_block,
                                .page_bytes = page_blocks * plane.bytes_per_block,
                                .strategy = options.strategy,
                                .page_file = options.page_file};
    if (resident_blocks) of_plane.resident_bytes = *resident_blocks * plane.bytes_per_block;
    plane.buffer = make_paged_buffer(device, of_plane);
  }
}

std::int64_t PagedState::bytes_per_block() const {
  std::int64_t bytes = 0;
  for (const Plane& plane : planes_) bytes += plane.bytes_per_block;
  return bytes;
}

std::int64_t PagedState::bytes() const {
  return ceil_divide(elements_, state_block_size) * bytes_per_block();
}

ByteRange PagedState::plane_range(int i, std::int64_t first, std::int64_t count) const {
  const Plane& plane = planes_[static_cast<std::size_t>(i)];
  // Scales are of whole blocks, the last of which may be short.
  const std::int64_t bytes =
      is_8bit_ && plane.dtype == DType::float32
          ? ceil_divide(count, state_block_size) * element_bytes(DType::float32)
          : count * element_bytes(plane.dtype);
  return {first / state_block_size * plane.bytes_per_block, bytes};
}

OptimizerState PagedState::state_at(const Addresses& addresses, std::int64_t origin,
                                    std::int64_t first, std::int64_t count) const {
  const auto view = [&](int i) {
    const ByteRange range = plane_range(i, first - origin, count);
    const DType dtype = planes_[static_cast<std::size_t>(i)].dtype;
    TensorView tensor{.data = addresses[static_cast<std::size_t>(i)] + range.offset,
                      .dtype = dtype,
                      .device = device_,
                      .shape = {range.bytes / element_bytes(dtype)},
                      .is_present = true};
    return tensor;
  };
  OptimizerState state;
  int plane = 0;
  state.exp_avg = view(plane++);
  if (is_8bit_) state.exp_avg_absmax = view(plane++);
  if (rule_ == OptimizerRule::lion) return state;
  state.exp_avg_sq = view(plane++);
  if (is_8bit_) state.exp_avg_sq_absmax = view(plane++);
  return state;
}

PagedState::Addresses PagedState::begin(std::int64_t page, void* stream) {
  Addresses addresses{};
  for (std::size_t i = 0; i < planes_.size(); ++i) {
    try {
      addresses[i] = planes_[i].buffer->begin(page, stream);
    } catch (...) {
      const std::exception_ptr error = std::current_exception();
      while (i-- > 0) try_to([&] { planes_[i].buffer->end(page, stream); });
      std::rethrow_exception(error);
    }
  }
  return addresses;
}

void PagedState::end(std::int64_t page, void* stream) {
  for_each_plane([&](PagedBuffer& plane) { plane.end(page, stream); });
}

void PagedState::join(void* stream) {
  for_each_plane([&](PagedBuffer& plane) { plane.join(stream); });
}

void PagedState::abandon(std::optional<std::int64_t> page, void* stream) noexcept {
  if (page) try_to([&] { end(*page, stream); });
  try_to([&] { join(stream); });
}

template <typename Function>
void PagedState::for_each_plane(Function&& function) {
  std::exception_ptr first_error;
  for (const Plane& plane : planes_) {
    const std::exception_ptr error = try_to([&] { function(*plane.buffer); });
    if (!first_error) first_error = error;
  }
  if (first_error) std::rethrow_exception(first_error);
}

PagedState::Addresses PagedState::data() const {
  Addresses addresses{};
  for (std::size_t i = 0; i < planes_.size(); ++i) addresses[i] = planes_[i].buffer->data();
  return addresses;
}

bool PagedState::make_resident(void* stream) {
  // Each finds room for those after it, too, but not for those before, which have it by then.
  std::int64_t bytes_after = bytes();
  return std::all_of(planes_.begin(), planes_.end(), [&](const Plane& plane) {
    bytes_after -= plane.buffer->bytes();
    return plane.buffer->make_resident(stream, bytes_after);
  });
}

PagedBufferReport PagedState::report() const {
  PagedBufferReport sum;
  for (const Plane& plane : planes_) {
    const PagedBufferReport report = plane.buffer->report();
    sum.unknown_bytes += report.unknown_bytes;
    sum.host_bytes += report.host_bytes;
    sum.device_bytes += report.device_bytes;
    sum.moved_to_device_bytes += report.moved_to_device_bytes;
    sum.moved_to_host_bytes += report.moved_to_host_bytes;
    sum.refused_bytes += report.refused_bytes;
  }
  return sum;
}

}  // namespace qlora
