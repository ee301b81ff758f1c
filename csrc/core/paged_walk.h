// The order of a step on state in pages: which pieces of which parameters each page holds.
#pragma once

#include <algorithm>
#include <span>
#include <vector>

#include "core/paged_state.h"

namespace qlora {

/// The part of a parameter that lies in elements [begin, end) of its state's pages, which it has a
/// part in.
inline OptimizerTensor piece_of(const PagedTensor& tensor, const PagedState& state,
                                const PagedState::Addresses& addresses, std::int64_t origin,
                                std::int64_t begin, std::int64_t end) {
  const std::int64_t tensor_end = tensor.first_element + tensor.param.numel();
  const std::int64_t first = std::max(begin, tensor.first_element);
  const std::int64_t last = std::min(end, tensor_end);
  const std::int64_t offset = first - tensor.first_element;
  const auto slice = [&](TensorView view) {
    view.data = static_cast<std::byte*>(view.data) + offset * element_bytes(view.dtype);
    view.shape = {last - first};
    return view;
  };
  return {.param = slice(tensor.param),
          .grad = slice(tensor.grad),
          .state = state.state_at(addresses, origin, first, last - first),
          .step_count = tensor.step_count,
          .counts_step = last == tensor_end,
          .number = tensor.number,
          .first_element = offset};
}

/// Calls `step_pieces(std::span<const OptimizerTensor>)`, which queues its work on `stream`: once if
/// the state is resident, and else for each page that a tensor has a part in, while the next one
/// comes. A tensor without elements is a piece of the page where it would begin, so that it counts
/// its step too.
///
/// Precondition: the tensors are validated, and so in the order of their first elements.
template <typename StepPieces>
void walk_pages(PagedState& state, std::span<const PagedTensor> tensors, void* stream,
                StepPieces&& step_pieces) {
  std::vector<OptimizerTensor> pieces;
  if (state.make_resident(stream)) {
    pieces.reserve(tensors.size());
    const PagedState::Addresses addresses = state.data();
    for (const PagedTensor& tensor : tensors) {
      pieces.push_back(piece_of(tensor, state, addresses, 0, 0, state.elements()));
    }
    try {
      step_pieces(std::span<const OptimizerTensor>(pieces));
    } catch (...) {
      state.join(stream);
      throw;
    }
    state.join(stream);
    return;
  }
  const std::int64_t page_elements = state.page_elements();
  const auto page_of = [&](std::int64_t element) {
    return std::min(element / page_elements, state.page_count() - 1);
  };
  const auto last_page_of = [&](const PagedTensor& tensor) {
    const std::int64_t count = std::max<std::int64_t>(tensor.param.numel(), 1);
    return page_of(tensor.first_element + count - 1);
  };
  std::size_t first = 0;  // of the tensors that are not done
  for (std::int64_t page = 0; first < tensors.size(); ++page) {
    page = std::max(page, page_of(tensors[first].first_element));
    const std::int64_t begin = page * page_elements;
    pieces.clear();
    const PagedState::Addresses addresses = state.begin(page, stream);
    std::size_t i = first;
    for (; i < tensors.size() && page_of(tensors[i].first_element) <= page; ++i) {
      pieces.push_back(piece_of(tensors[i], state, addresses, begin, begin, begin + page_elements));
    }
    try {
      step_pieces(std::span<const OptimizerTensor>(pieces));
    } catch (...) {
      state.end(page, stream);
      throw;
    }
    state.end(page, stream);
    // At most the last one goes on in the next page.
    first = last_page_of(tensors[i - 1]) > page ? i - 1 : i;
  }
  state.join(stream);
}

}  // namespace qlora
