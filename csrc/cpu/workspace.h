// Memory that a thread's kernels reuse from call to call: fresh pages cost more than the work done
// in them.
#pragma once

#include <cstddef>

namespace qlora {

/// What a thread may hold at the same time.
enum class Workspace { packed_activations, weight_panel, scales, sums, lora_call, lora_chunk };
inline constexpr int workspace_count = 6;

/// At least `bytes` bytes of this thread's, aligned to a page, with anything in them. They
/// stay valid until the next call with the same `purpose`. Throws std::bad_alloc.
void* thread_workspace(Workspace purpose, std::size_t bytes);

}  // namespace qlora
