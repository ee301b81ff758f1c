// How an optimiser's step is queued on the emulated device: launches, memory, streams, errors.
#include "cuda/optimizer.h"
#include "cuda/optimizer_fixture.h"
#include "support/expect_error.h"

namespace qlora {
namespace {

class CudaOptimizerLaunch : public CudaOptimizer {};

TEST_P(CudaOptimizerLaunch, AListOfAllDtypesIsOneLaunch) {
  expect_the_cpu_bits(make_list(), kind, 1, generator);
  EXPECT_EQ(emulator::device().launch_count, 1);
}

TEST_P(CudaOptimizerLaunch, AListOfMoreTensorsThanALaunchTakesIsSeveral) {
  std::vector<Parameter> list;
  for (int i = 0; i < 500; ++i) {
    list.push_back(make_parameter(kind, {.param = DType::bfloat16}, i % 7 * 3, generator));
  }
  expect_the_cpu_bits(list, kind, 1, generator);
  EXPECT_EQ(emulator::device().launch_count, 2);
}

TEST_P(CudaOptimizerLaunch, NothingIsLaunchedForEmptyTensors) {
  std::vector<Parameter> list;
  for (int i = 0; i < 3; ++i) list.push_back(make_parameter(kind, {}, 0, generator));
  expect_the_cpu_bits(list, kind, 1, generator);
  EXPECT_EQ(emulator::device().launch_count, 0);
}

TEST_P(CudaOptimizerLaunch, AnOldDriverIsUnsupported) {
  std::vector<Parameter> list = {make_parameter(kind, {}, 700, generator)};
  DeviceList on_device(list);
  emulator::device().driver_version = 12000;
  expect_error<Unsupported>(
      message(kind.operation(),
              ": the NVIDIA driver is for CUDA 12.0, want 12.1 or newer: a launch carries 30 KB of "
              "parameters"),
      [&] { step_list(on_device.views(), kind, step_number(1, kind)); });
}

TEST_P(CudaOptimizerLaunch, StepsCanBeCapturedAndRunOnTheCallersStream) {
  std::vector<Parameter> list = make_list(true);
  DeviceList on_device(list);
  emulator::device().is_capturing = true;
  int memory = 0;
  step_list(on_device.views(), kind, step_number(1, kind), &memory);
  EXPECT_EQ(static_cast<void*>(emulator::device().stream), &memory);
  EXPECT_EQ(emulator::device().synchronize_count, 0);
}

TEST_P(CudaOptimizerLaunch, WithoutMemoryNothingIsQueuedOfAnyLaunch) {
  std::vector<Parameter> list;
  for (int i = 0; i < 500; ++i) {
    list.push_back(make_parameter(kind, {}, 3, generator));
  }
  DeviceList on_device(list);
  HostTensor lr(DType::float32, {1});
  OptimizerStep step = step_number(1, kind);
  step.lr_tensor = on_cuda(lr.view());
  emulator::device().is_out_of_memory = true;
  EXPECT_THROW(step_list(on_device.views(), kind, step), OutOfMemory);
  EXPECT_EQ(emulator::device().launch_count, 0);
}

TEST_P(CudaOptimizerLaunch, AStepOfSeveralCallsTakesItsMemoryBeforeTheFirst) {
  // A device on which nothing has been loaded yet.
  emulator::device().current =
      18 + 4 * kind.is_stochastic + 2 * (kind.rule == OptimizerRule::lion) + kind.is_8bit;
  std::vector<Parameter> list = make_list(true);
  for (Parameter& p : list) draw_gradient(p, 1, generator);
  DeviceList on_device(list);
  const OptimizerStep step = step_number(1, kind);
  const std::vector<OptimizerTensor> tensors = optimizer_tensors(on_device.views(), kind);
  const std::span<const OptimizerTensor> all(tensors);

  const auto make_launch = [&] {
    return cuda::OptimizerLaunch(kind.rule, kind.is_8bit, step, true, nullptr);
  };
  emulator::device().is_out_of_memory = true;
  expect_error<OutOfMemory>(
      message(kind.operation(),
              ": loading a kernel: cudaErrorMemoryAllocation: ", "as the emulator was told"),
      make_launch);
  emulator::device().is_out_of_memory = false;
  auto launch = make_launch();
  emulator::device().is_out_of_memory = true;
  launch(all.first(4));
  launch(all.subspan(4));
  step_list(cpu_views(list), kind, step);
  EXPECT_TRUE(on_device.equals(list));
}

TEST_P(CudaOptimizerLaunch, ALaunchThatWasMadeWithoutStepCountsRefusesThem) {
  std::vector<Parameter> list = make_list(true);
  DeviceList on_device(list);
  cuda::OptimizerLaunch launch(kind.rule, kind.is_8bit, step_number(1, kind), false, nullptr);
  expect_invalid(message(kind.operation(),
                         ": step_count is present, want none in a launch that was made without"),
                 [&] { launch(optimizer_tensors(on_device.views(), kind)); });
  EXPECT_EQ(emulator::device().launch_count, 0);
}

TEST_P(CudaOptimizerLaunch, PiecesOfATensorInSeveralCallsAreOneStepOfIt) {
  // As a walk over pages has it: the last piece counts the step.
  std::vector<Parameter> list = make_list(true);
  DeviceList on_device(list);
  for (std::int64_t t = 1; t <= 2; ++t) {
    for (Parameter& p : list) draw_gradient(p, t, generator);
    on_device.set_gradients(list);
    step_list(cpu_views(list), kind, step_number(1, kind));
    cuda::OptimizerLaunch launch(kind.rule, kind.is_8bit, step_number(1, kind), true, nullptr);
    for (const OptimizerTensor& tensor : optimizer_tensors(on_device.views(), kind)) {
      const std::int64_t count = tensor.param.numel();
      for (std::int64_t begin = 0; begin == 0 || begin < count; begin += 512) {
        const OptimizerTensor piece = piece_of(tensor, begin, std::min(begin + 512, count));
        launch({&piece, 1});
      }
    }
    ASSERT_TRUE(on_device.equals(list)) << "step " << t;
  }
}

TEST_P(CudaOptimizerLaunch, AFailedLaunchFreesItsMemory) {
  std::vector<Parameter> list = make_list(true);
  DeviceList on_device(list);
  emulator::device().launch_error = cudaErrorIllegalAddress;
  expect_error<CudaError>(
      message(kind.operation(), ": cudaErrorIllegalAddress: as the emulator was told"),
      [&] { step_list(on_device.views(), kind, step_number(1, kind)); });
}

TEST_P(CudaOptimizerLaunch, AnAddressThatIsNoElementsIsRefusedByName) {
  std::vector<Parameter> list = make_list(true);
  DeviceList on_device(list);
  std::vector<Views> views = on_device.views();
  views[2][6].data = views[2][6].as<std::uint8_t>() + 2;
  expect_invalid(message(kind.operation(),
                         ": step_count is float32, but its memory begins 2 bytes past a multiple "
                         "of 4; pass step_count.clone()"),
                 [&] { step_list(views, kind, step_number(1, kind)); });
}

INSTANTIATE_TEST_SUITE_P(All, CudaOptimizerLaunch, step_kinds(false), kind_test_name);
INSTANTIATE_TEST_SUITE_P(Stochastic, CudaOptimizerLaunch, step_kinds(true), kind_test_name);

}  // namespace
}  // namespace qlora
