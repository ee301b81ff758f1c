// The CUDA backend's PagedBuffer: managed or pinned memory (cuda/page_memory.h) behind one order of
// copies and work.
//
// A page in use, coming or going has a slot: page % slot_count, of two or three. Three let a page
// come while another goes, each on its own stream, so that the bus carries both ways at once. With
// two a page comes when the one before has gone.
//
//   coming stream   | load i+1 |          | load i+2 |
//   caller's stream | work on i |         | work on i+1 |
//   going stream    | save i-1 |          | save i |
//
//   loaded   coming → the caller's    work on a page waits until it is there
//   used     the caller's → going     it goes when the work is done
//   saved    going → coming           its slot is then free, and the device memory with it
//
// With managed memory and a budget, as many of the first pages as fit beside the slots stay on the
// device, and the others are its guests; without a budget all stay, as far as the driver lets them.
#pragma once

#include "core/paged_buffer.h"

namespace qlora::cuda {

std::unique_ptr<PagedBuffer> make_cuda_paged_buffer(Device device,
                                                    const PagedBufferOptions& options);

}  // namespace qlora::cuda
