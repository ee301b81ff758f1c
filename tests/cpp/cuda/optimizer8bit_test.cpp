// The 8-bit state that the emulated device stores: codes at the midpoints of the maps, and blocks
// whose scale is no ordinary number. optimizer_test.cpp tests whole steps.
#include <limits>

#include "cuda/emulation/emulator.h"
#include "cuda/optimizer.h"
#include "cuda/optimizer_list.h"
#include "format/dynamic_map.h"

namespace qlora {
namespace {

class CudaOptimizer8bit : public testing::Test {
 protected:
  Generator generator{53};

  void SetUp() override { emulator::device() = {}; }

  /// Steps one fp32 parameter with these gradients from no state, on the CPU and on the device, and
  /// returns it. With beta1 = 0 its first moment is the gradient.
  Parameter step_with(const std::vector<double>& gradients) {
    Parameter p =
        make_parameter(adamw_8bit, {}, static_cast<std::int64_t>(gradients.size()), generator);
    for (std::size_t i = 0; i < gradients.size(); ++i) {
      p.grad.set(static_cast<std::int64_t>(i), gradients[i]);
    }
    OptimizerStep step;
    step.beta1 = 0.0;
    std::vector<Parameter> list = {std::move(p)};
    DeviceList on_device(list);
    step_list(on_device.views(), adamw_8bit, step);
    step_list(cpu_views(list), adamw_8bit, step);
    EXPECT_TRUE(on_device.equals(list));
    return list[0];
  }
};

TEST_F(CudaOptimizer8bit, EveryMidpointAndItsNeighboursGetTheirCodes) {
  std::vector<double> gradients;
  std::vector<std::uint8_t> codes;
  for (int i = 0; i < 255; ++i) {
    if (i % 85 == 0) gradients.push_back(1.0), codes.push_back(255);  // the absmax of a block
    const float midpoint = signed_dynamic_map.midpoints[static_cast<std::size_t>(i)];
    for (const float x :
         {std::nextafter(midpoint, -2.0f), midpoint, std::nextafter(midpoint, 2.0f)}) {
      gradients.push_back(static_cast<double>(x));
      codes.push_back(static_cast<std::uint8_t>(x > midpoint ? i + 1 : i));
    }
  }
  EXPECT_EQ(step_with(gradients).exp_avg.bytes(), codes);
}

TEST_F(CudaOptimizer8bit, ASecondMomentThatIsNotZeroIsNotEncodedAsZero) {
  EXPECT_EQ(step_with({1.0, 1e-4, 1e-22, 0.0}).exp_avg_sq.bytes(),
            (std::vector<std::uint8_t>{255, 1, 0, 0}));
}

TEST_F(CudaOptimizer8bit, ABlockOfSubnormalsIsDivided) {
  std::vector<double> gradients(300, 0x1p-140);
  for (std::size_t i = 0; i < gradients.size(); i += 3) gradients[i] = 0x1p-149 * (i % 200);
  const Parameter p = step_with(gradients);
  EXPECT_EQ(p.exp_avg.bytes()[1], 255);
}

TEST_F(CudaOptimizer8bit, ABlockOfZerosHasTheCodesOfZero) {
  const Parameter p = step_with(std::vector<double>(300, -0.0));
  EXPECT_EQ(p.exp_avg.bytes(), std::vector<std::uint8_t>(300, dynamic_map_signed_zero_code));
  EXPECT_EQ(p.exp_avg_sq.bytes(), std::vector<std::uint8_t>(300, dynamic_map_unsigned_zero_code));
}

TEST_F(CudaOptimizer8bit, TheGridIsWhatTheDeviceHoldsAtOnce) {
  // 20 chunks, for thread blocks that go round their loop.
  emulator::device().multiprocessor_count = 2;
  emulator::device().current = 17;  // whose traits nobody has asked for
  for (const auto& [rule, thread_blocks] :
       {std::pair{OptimizerRule::adamw, 6u}, std::pair{OptimizerRule::lion, 8u}}) {
    const StepKind kind{rule, true};
    std::vector<Parameter> list = {make_parameter(
        kind, {.param = DType::bfloat16, .grad = DType::bfloat16}, 20 * 4096 - 77, generator)};
    draw_gradient(list[0], 1, generator);
    DeviceList on_device(list);
    cuda::OptimizerLaunch launch(rule, true, step_number(1, kind), false, nullptr);
    launch(optimizer_tensors(on_device.views(), kind));
    EXPECT_EQ(emulator::device().thread_blocks, thread_blocks);
    step_list(cpu_views(list), kind, step_number(1, kind));
    EXPECT_TRUE(on_device.equals(list));
  }
}

}  // namespace
}  // namespace qlora
