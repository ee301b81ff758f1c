// The asynchronous copies of the thread block's threads.
#pragma once

namespace emulator {

void forget_copies(unsigned threads);

/// Fails if a copy of this thread is on its way still: it would land in the shared memory of
/// another thread block.
void check_no_copies_left();

}  // namespace emulator
