// What tests of the CUDA backend on the emulated device share.
#pragma once

#include <algorithm>

#include "cuda/emulation/emulator.h"
#include "support/stored_weight.h"

namespace qlora {

/// The same memory, as what it would be on the emulated device.
inline TensorView on_cuda(TensorView view, int index = 0) {
  view.device = {DeviceType::cuda, index};
  return view;
}

inline NF4Weight on_cuda(NF4Weight weight, int index = 0) {
  for (TensorView* view :
       {&weight.codes, &weight.absmax, &weight.nested_absmax, &weight.nested_offset}) {
    *view = on_cuda(*view, index);
  }
  return weight;
}

/// The bytes of a tensor moved to an address `offset` bytes past a multiple of 16; written back
/// when it goes.
class Shifted {
 public:
  Shifted(HostTensor& tensor, std::size_t offset) : tensor_(tensor), offset_(offset) {
    memory_.resize(offset + tensor.bytes().size());
    std::copy(tensor.bytes().begin(), tensor.bytes().end(), address());
  }
  ~Shifted() { std::copy_n(address(), tensor_.bytes().size(), tensor_.bytes().begin()); }
  Shifted(const Shifted&) = delete;
  Shifted& operator=(const Shifted&) = delete;

  TensorView view() {
    TensorView view = on_cuda(tensor_.view());
    view.data = address();
    return view;
  }

 private:
  std::uint8_t* address() { return memory_.data() + offset_; }

  HostTensor& tensor_;
  std::size_t offset_;
  std::vector<std::uint8_t> memory_;
};

/// Runs `test` with the threads in each order that tests of kernels go through.
template <typename Test>
void in_every_order(Test&& test) {
  const auto run = [&](emulator::Order order, unsigned seed, const char* name) {
    SCOPED_TRACE(message(name, " order of the threads, seed ", seed));
    emulator::device().order = order;
    emulator::device().seed = seed;
    test();
  };
  run(emulator::Order::ascending, 0, "ascending");
  run(emulator::Order::descending, 0, "descending");
  for (const unsigned seed : {1u, 2u, 3u}) run(emulator::Order::shuffled, seed, "shuffled");
}

/// Begins with a device in its usual state, and ends with every allocation returned.
class CudaEmulation : public testing::Test {
 protected:
  void SetUp() override { emulator::device() = {}; }
  void TearDown() override {
    EXPECT_EQ(emulator::device().live_allocations, 0);
    EXPECT_EQ(emulator::device().failure, "");
  }
};

}  // namespace qlora
