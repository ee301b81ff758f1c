// An optimiser's state in pages: what PagedBuffer is to bytes, this is to moments.
//
// Every kind of number has a plane of its own, which is a PagedBuffer, so that the moments of a
// parameter are one piece of memory however many pages they take. All planes are cut at the same
// elements: a page of the state is a page of each plane.
//
//                page 0             page 1             page 2
//   exp_avg      | a a a b b b b b | b b b b b c c d d | d d d      |
//   exp_avg_sq   | a a a b b b b b | b b b b b c c d d | d d d      |     parameters a to d
//
// A parameter begins at a multiple of 256 elements, the block of 8-bit state, whose scales lie in
// planes of one float32 a block. Small parameters share a page; none is left out.
#pragma once

#include <array>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "core/operations.h"
#include "core/paged_buffer.h"

namespace qlora {

struct PagedStateOptions {
  std::int64_t elements = 0;

  /// Of all planes together. Rounded down to a whole number of blocks (PagedState::page_elements).
  std::int64_t page_bytes = PagedBufferOptions{}.page_bytes;

  // As in PagedBufferOptions; resident_bytes is of all planes together.
  PagingStrategy strategy = PagingStrategy::automatic;
  std::optional<std::int64_t> resident_bytes = std::nullopt;
  std::optional<std::string> page_file = std::nullopt;
};

class PagedState {
 public:
  static constexpr int max_plane_count = 4;
  using Addresses = std::array<std::byte*, max_plane_count>;

  /// Throws what make_paged_buffer throws.
  PagedState(Device device, OptimizerRule rule, bool is_8bit, const PagedStateOptions& options);

  Device device() const { return device_; }
  OptimizerRule rule() const { return rule_; }
  bool is_8bit() const { return is_8bit_; }
  PagingStrategy strategy() const { return planes_.front().buffer->strategy(); }
  std::int64_t elements() const { return elements_; }
  std::int64_t page_elements() const { return page_elements_; }
  std::int64_t page_count() const { return planes_.front().buffer->page_count(); }
  std::int64_t bytes() const;
  std::int64_t page_bytes() const { return page_elements_ / state_block_size * bytes_per_block(); }

  /// In the order of OptimizerState's members, absent ones left out.
  int plane_count() const { return static_cast<int>(planes_.size()); }
  const PagedBuffer& plane(int i) const { return *planes_[static_cast<std::size_t>(i)].buffer; }
  std::shared_ptr<PagedBuffer> shared_plane(int i) const {
    return planes_[static_cast<std::size_t>(i)].buffer;
  }
  /// The bytes of a plane that belong to elements [first, first + count); first is a multiple of 256.
  ByteRange plane_range(int i, std::int64_t first, std::int64_t count) const;

  /// Views of elements [first, first + count) in planes whose element `origin` is at `addresses`.
  OptimizerState state_at(const Addresses& addresses, std::int64_t origin, std::int64_t first,
                          std::int64_t count) const;

  // As PagedBuffer's, of all planes.

  Addresses begin(std::int64_t page, void* stream);
  void end(std::int64_t page, void* stream);
  void join(void* stream);
  /// Ends `page`, if one is in use, and joins, as far as that goes: for a step that has failed.
  void abandon(std::optional<std::int64_t> page, void* stream) noexcept;
  Addresses data() const;
  bool make_resident(void* stream);
  PagedBufferReport report() const;

 private:
  struct Plane {
    DType dtype;
    std::int64_t bytes_per_block;  // of 256 elements
    std::shared_ptr<PagedBuffer> buffer;
  };

  std::int64_t bytes_per_block() const;

  /// Calls it for every plane, also after one that throws, and throws the first error then.
  template <typename Function>
  void for_each_plane(Function&& function);

  Device device_;
  OptimizerRule rule_;
  bool is_8bit_;
  std::int64_t elements_, page_elements_;
  std::vector<Plane> planes_;
};

}  // namespace qlora
