// The order of a step on state in pages: which pieces of which parameters each page holds.
#pragma once

#include <algorithm>
#include <optional>
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
  pieces.reserve(tensors.size());
  std::optional<std::int64_t> page_in_use;
  try {
    if (state.make_resident(stream)) {
      const PagedState::Addresses addresses = state.data();
      for (const PagedTensor& tensor : tensors) {
        pieces.push_back(piece_of(tensor, state, addresses, 0, 0, state.elements()));
      }
      step_pieces(std::span<const OptimizerTensor>(pieces));
    } else {
      const std::int64_t page_elements = state.page_elements();
      std::size_t first = 0;  // of the tensors that are not done
      for (std::int64_t page = 0; first < tensors.size(); ++page) {
        page = std::max(page, tensors[first].first_element / page_elements);
        const std::int64_t begin = page * page_elements, end = begin + page_elements;
        const PagedState::Addresses addresses = state.begin(page, stream);
        page_in_use = page;
        pieces.clear();
        std::size_t i = first;
        for (; i < tensors.size() && tensors[i].first_element < end; ++i) {
          pieces.push_back(piece_of(tensors[i], state, addresses, begin, begin, end));
        }
        step_pieces(std::span<const OptimizerTensor>(pieces));
        page_in_use.reset();
        state.end(page, stream);
        // At most the last one goes on in the next page.
        const PagedTensor& last = tensors[i - 1];
        first = last.first_element + last.param.numel() > end ? i - 1 : i;
      }
    }
  } catch (...) {
    state.abandon(page_in_use, stream);
    throw;
  }
  state.join(stream);
}

}  // namespace qlora
