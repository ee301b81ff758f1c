// In which order thread blocks, warps or lanes take turns.
#pragma once

#include <algorithm>
#include <numeric>
#include <random>
#include <vector>

#include "cuda/emulation/emulator.h"

namespace emulator {

/// 0 to count - 1, in the order that the test wants.
class Sequence {
 public:
  Sequence(unsigned count, std::mt19937& random) : numbers_(count), random_(random) {
    std::iota(numbers_.begin(), numbers_.end(), 0u);
    if (device().order == Order::descending) std::reverse(numbers_.begin(), numbers_.end());
  }

  /// The numbers; shuffled anew each time if they are to be.
  const std::vector<unsigned>& next() {
    if (device().order == Order::shuffled) std::shuffle(numbers_.begin(), numbers_.end(), random_);
    return numbers_;
  }

 private:
  std::vector<unsigned> numbers_;
  std::mt19937& random_;
};

}  // namespace emulator
