// Threads that share a range of work. Their number is the caller's (ExecutionContext), which Python
// takes from torch.get_num_threads(). They are those of the OpenMP runtime that the process has
// loaded, as torch does on Linux, or else of a small pool of the library's own: two sets of threads
// would fight for the cores, for OpenMP's spin for a while after each of torch's operations.
#pragma once

#include <cstdint>

namespace qlora {

/// A reference to a callable `void(begin, end)` that outlives the call it is passed to. Unlike
/// std::function it allocates nothing and leaves no shared inline functions behind, so that sources
/// compiled for one instruction set may use it.
class RangeFunction {
 public:
  template <typename Function>
  [[gnu::always_inline]] RangeFunction(const Function& function)  // NOLINT: converts on purpose
      : object_(&function), call_([](const void* object, std::int64_t begin, std::int64_t end) {
          (*static_cast<const Function*>(object))(begin, end);
        }) {}

  void operator()(std::int64_t begin, std::int64_t end) const { call_(object_, begin, end); }

 private:
  const void* object_;
  void (*call_)(const void* object, std::int64_t begin, std::int64_t end);
};

/// Calls `body(begin, end)` on disjoint pieces that cover [0, count), on up to `num_threads`
/// threads, and returns when all are done. Pieces are multiples of `grain` long but for the last.
/// An exception in a piece is rethrown here.
///
/// The results must not depend on where the pieces are cut. A call from within a piece runs on its own
/// thread alone, as does, without OpenMP, one that is made while another thread uses the pool. A
/// forked child starts with a pool of its own.
void parallel_for(int num_threads, std::int64_t count, std::int64_t grain, RangeFunction body);

}  // namespace qlora
