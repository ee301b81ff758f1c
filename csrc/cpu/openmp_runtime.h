// The OpenMP runtime of the process, if there is one: nothing is linked or loaded for it.
#pragma once

namespace qlora {

/// GOMP_parallel: runs `function(argument)` on a team of up to `thread_count` threads, the caller's
/// among them, and returns when all have. Part of the stable interface between GCC's code and libgomp
/// (libgomp/libgomp.map, GOMP_4.0); LLVM's and Intel's runtimes have it too.
using OpenMPParallel = void (*)(void (*function)(void*), void* argument, unsigned thread_count,
                                unsigned flags);

/// Null where no runtime is loaded. Looked up once, at the first call.
OpenMPParallel openmp_parallel();

}  // namespace qlora
