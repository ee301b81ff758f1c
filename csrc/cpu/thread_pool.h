// A small pool of threads that splits a range of work. It is the library's own: torch's OpenMP
// runtime is not linked, and the number of threads is the caller's (ExecutionContext), which Python
// takes from torch.get_num_threads().
#pragma once

#include <cstdint>
#include <functional>

namespace qlora {

/// Calls `body(begin, end)` on disjoint pieces that cover [0, count), on up to `num_threads`
/// threads, and returns when all are done. Pieces are multiples of `grain` long but for the last.
/// An exception in a piece is rethrown here.
///
/// The results must not depend on where the pieces are cut. A call made while another thread uses
/// the pool, or from within a piece, runs on its own thread alone. A forked child starts with a
/// pool of its own.
void parallel_for(int num_threads, std::int64_t count, std::int64_t grain,
                  const std::function<void(std::int64_t begin, std::int64_t end)>& body);

}  // namespace qlora
