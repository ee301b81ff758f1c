// Host tensors on a device, real or emulated, for tests that run on both.
#pragma once

#include <string>
#include <vector>

#include "support/stored_weight.h"

namespace qlora {

/// Puts the device into its usual state; says why there is none, or nothing.
std::string prepare_device();

/// Copies of host tensors in device memory of their exact size, for one call or several. They are
/// written back when it goes, after all work has been waited for.
///
///   OnDevice device;
///   nf4_dequantize(device(weight), device(out), {});
class OnDevice {
 public:
  OnDevice() = default;
  ~OnDevice();
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

  /// The tensor on the device; an absent one stays absent.
  TensorView operator()(HostTensor& tensor);
  NF4Weight operator()(StoredWeight& weight);

 private:
  struct Copy {
    HostTensor* original;
    void* memory;
  };
  std::vector<Copy> copies_;
};

}  // namespace qlora
