// The emulated device, in its usual state.
#include "cuda/device_memory.h"
#include "cuda/emulation/emulator.h"

namespace qlora {

std::string prepare_device() {
  emulator::device() = {};
  return "";
}

}  // namespace qlora
