// For tests of the emulated device: small kernels run on it, and what it says of wrong ones.
#pragma once

#include <type_traits>

#include "cuda/launch.cuh"
#include "cuda/support.h"

namespace qlora::cuda {

class Emulator : public CudaEmulation {
 protected:
  template <typename... Parameters>
  void run(void (*kernel)(Parameters...), const LaunchShape& shape,
           std::type_identity_t<Parameters>... arguments) {
    launch("a test", kernel, shape, nullptr, arguments...);
  }

  /// In every order of the threads the kernel fails, and the error says `what`.
  template <typename... Parameters>
  void expect_failure(const char* what, void (*kernel)(Parameters...), const LaunchShape& shape,
                      std::type_identity_t<Parameters>... arguments) {
    in_every_order([&] {
      try {
        run(kernel, shape, arguments...);
        ADD_FAILURE() << "no error, want: " << what;
      } catch (const CudaError& error) {
        EXPECT_PRED_FORMAT2(testing::IsSubstring,
                            "a test: cudaErrorLaunchFailure: thread block 0: ", error.what());
        EXPECT_PRED_FORMAT2(testing::IsSubstring, what, error.what());
      }
      emulator::device().failure.clear();
    });
  }
};

}  // namespace qlora::cuda
