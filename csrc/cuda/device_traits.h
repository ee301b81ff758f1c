// What plans depend on of a device: plain numbers, so that tests can plan for any.
#pragma once

#include <cstdint>

namespace qlora::cuda {

struct DeviceTraits {
  int compute_capability = 0;  // 10 * major + minor
  int multiprocessor_count = 0;
  int max_shared_bytes = 0;  // of a thread block, when asked for
  std::int64_t l2_bytes = 0;
};

}  // namespace qlora::cuda
