// The CPU's PagedBuffer in a file (cpu/page_file.h), of which memory holds a part.
//
// Without a budget pages are asked for ahead of their use, and the kernel decides which ones stay.
// With one, the first pages stay, and the others are guests, of which memory holds three at a time,
// or two if the budget is no more: one is in use, one comes, one goes.
//
//   reading    | page i+1 |          | page i+2 |
//   caller     | work on i           | work on i+1          |
//   writing    | page i-1 |          | page i   |
//
// `end` starts writing a page out, and waits for the one that ended before it, whose writing has gone
// on beside the work: the disk falls behind by no more than a page. With room for two, a page comes
// when it is begun.
#pragma once

#include "core/paged_buffer.h"

namespace qlora {

/// Precondition: options.page_file is given.
std::unique_ptr<PagedBuffer> make_file_paged_buffer(Device device,
                                                    const PagedBufferOptions& options);

}  // namespace qlora
