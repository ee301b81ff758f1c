// Optimisers' steps on the emulated device have the CPU's bits, whatever the list, and whether a
// step's numbers are on the host or on the device. What all rules and kinds of state share is
// tested with all.
#include <limits>

#include "cuda/optimizer_fixture.h"
#include "cuda/optimizer_rules.cuh"

namespace qlora {
namespace {

using emulator::Order;

constexpr std::int64_t odd_sizes[] = {0, 1, 3, 255, 256, 257, 1000, 0, 4095, 4096, 4097};

/// What is left of the rule where p = 0, m = 1 and lr = 1 is -1 / (sqrt(v) / divisor).
void expect_same_quotient(float v, float divisor) {
  AdamWRule rule{OptimizerNumbers{}};
  rule.one_minus_beta1 = 0.0f;
  rule.beta2 = 1.0f;
  rule.step_size = 1.0f;
  rule.bias_correction2_sqrt = divisor;
  rule.eps = 0.0f;
  float expected = 0.0f, actual = 0.0f, exp_avg = 1.0f;
  rule(expected, 0.0f, exp_avg, v);
  cuda::DeviceRule<AdamWRule>{rule}(actual, 0.0f, exp_avg, v);
  ASSERT_EQ(std::bit_cast<std::uint32_t>(actual), std::bit_cast<std::uint32_t>(expected))
      << "v = " << v << ", divisor = " << divisor;
}

TEST(CudaAdamWRule, DividesByTheBiasCorrectionToTheBit) {
  Generator generator{54};
  std::uniform_int_distribution<std::uint32_t> any_divisor(0x32000000u, 0x3f800000u);  // 2^-27 to 1
  std::uniform_int_distribution<std::uint32_t> any_finite(0, 0x7f7fffffu);  // subnormals too
  const auto divisor = [&] { return std::bit_cast<float>(any_divisor(generator)); };
  for (int i = 0; i < 300'000; ++i) {
    expect_same_quotient(std::bit_cast<float>(any_finite(generator)), divisor());
  }
  constexpr float extremes[] = {0.0f, 0x1p-149f, std::numeric_limits<float>::min(),
                                std::numeric_limits<float>::max(),
                                std::numeric_limits<float>::infinity()};
  for (const float v : extremes) {
    for (const float d : {0x1p-27f, divisor(), 1.0f}) expect_same_quotient(v, d);
  }
}

class CudaOptimizerDtypes : public testing::TestWithParam<std::tuple<StepKind, DType, DType>> {
 protected:
  const StepKind kind = std::get<0>(GetParam());
  const ParameterKind dtypes{.param = std::get<1>(GetParam()), .grad = std::get<2>(GetParam())};
  Generator generator{51};

  void SetUp() override { emulator::device() = {}; }
  void TearDown() override { EXPECT_EQ(emulator::device().live_allocations, 0); }

  std::vector<Parameter> make_list() {
    std::vector<Parameter> list;
    for (const std::int64_t size : odd_sizes) {
      list.push_back(make_parameter(kind, dtypes, size, generator));
    }
    return list;
  }
};

TEST_P(CudaOptimizerDtypes, StepsHaveTheCpuBits) {
  expect_the_cpu_bits(make_list(), kind, 4, generator);
}

TEST_P(CudaOptimizerDtypes, StepsOfTensorsThatAreNotAlignedHaveTheCpuBits) {
  expect_the_cpu_bits(make_list(), kind, 1, generator, 1);
  expect_the_cpu_bits(make_list(), kind, 1, generator, 2);
}

std::string dtypes_test_name(
    const testing::TestParamInfo<std::tuple<StepKind, DType, DType>>& test) {
  const auto& [kind, param, grad] = test.param;
  return kind.name() + name_of(param) + "Grad" + name_of(grad);
}
INSTANTIATE_TEST_SUITE_P(All, CudaOptimizerDtypes,
                         testing::Combine(step_kinds(false), float_dtypes, float_dtypes),
                         dtypes_test_name);
INSTANTIATE_TEST_SUITE_P(Stochastic, CudaOptimizerDtypes,
                         testing::Combine(step_kinds(true),
                                          testing::Values(DType::float32, DType::bfloat16),
                                          float_dtypes),
                         dtypes_test_name);

TEST_P(CudaOptimizer, TheOrderOfTheThreadsDoesNotMatterNorTheSizeOfTheGrid) {
  emulator::device().max_thread_blocks = 1;
  for (const Order order : {Order::ascending, Order::descending, Order::shuffled}) {
    emulator::device().order = order;
    expect_the_cpu_bits(make_list(), kind, 2, generator);
    expect_the_cpu_bits(make_list(true), kind, 1, generator);
  }
}

TEST_P(CudaOptimizer, NumbersOnTheDeviceAreThoseOfTheHost) {
  // The first list keeps its numbers on the host, the second on the device.
  std::vector<Parameter> list = make_list(), counted = list;
  HostTensor lr(DType::float32, {1}), scale(DType::float32, {1}), found(DType::float32, {1}, {0.0});
  for (Parameter& p : counted) p.step_count = HostTensor(DType::float32, {1}, {41.0});
  DeviceList on_device(counted);
  for (std::int64_t t = 42; t <= 44; ++t) {
    for (std::size_t i = 0; i < list.size(); ++i) {
      draw_gradient(list[i], t, generator);
      counted[i].grad = list[i].grad;
      // By a power of two, so that scaling and its undoing round nothing.
      for (std::int64_t j = 0; j < list[i].grad.numel(); ++j) {
        counted[i].grad.set(j, 0x1p7 * list[i].grad[j]);
      }
    }
    on_device.set_gradients(counted);
    OptimizerStep step = step_number(t, kind);
    lr.set(0, step.lr);
    step.lr = lr[0];  // as fp32
    step_list(cpu_views(list), kind, step);

    scale.set(0, 0x1p7);
    OptimizerStep read = step;
    read.lr = 77.0;
    read.step = 1;
    read.lr_tensor = on_cuda(lr.view());
    read.grad_scale = on_cuda(scale.view());
    read.found_inf = on_cuda(found.view());
    step_list(on_device.views(), kind, read);
    read.lr_tensor = lr.view();
    read.grad_scale = scale.view();
    read.found_inf = found.view();
    step_list(cpu_views(counted), kind, read);

    ASSERT_TRUE(on_device.equals(counted)) << "step " << t;
    for (std::size_t i = 0; i < list.size(); ++i) {
      EXPECT_EQ(counted[i].param.bytes(), list[i].param.bytes()) << "parameter " << i;
      EXPECT_EQ(counted[i].exp_avg.bytes(), list[i].exp_avg.bytes()) << "parameter " << i;
      EXPECT_EQ(counted[i].exp_avg_sq.bytes(), list[i].exp_avg_sq.bytes()) << "parameter " << i;
      EXPECT_EQ(counted[i].step_count[0], static_cast<double>(t));
    }
  }
  EXPECT_EQ(emulator::device().launch_count, 6);
  EXPECT_EQ(emulator::device().synchronize_count, 0);
}

TEST_P(CudaOptimizer, AGradientScaleOfAnySizeHasTheCpuBits) {
  std::vector<Parameter> list = make_list();
  DeviceList on_device(list);
  for (Parameter& p : list) draw_gradient(p, 1, generator);
  on_device.set_gradients(list);
  HostTensor scale(DType::float32, {1}, {3.0});
  OptimizerStep step = step_number(2, kind);
  step.grad_scale = scale.view();
  step_list(cpu_views(list), kind, step);
  step.grad_scale = on_cuda(scale.view());
  step_list(on_device.views(), kind, step);
  EXPECT_TRUE(on_device.equals(list));
}

TEST_P(CudaOptimizer, AStepThatFoundInfDoesNothing) {
  for (const bool has_step_count : {false, true}) {
    std::vector<Parameter> list = make_list(has_step_count);
    for (Parameter& p : list) draw_gradient(p, 1, generator);
    DeviceList on_device(list);
    for (const double found : {1.0, std::nan("")}) {
      HostTensor found_inf(DType::float32, {1}, {found});
      OptimizerStep step = step_number(1, kind);
      step.found_inf = on_cuda(found_inf.view());
      step_list(on_device.views(), kind, step);
      EXPECT_TRUE(on_device.equals(list));
    }
  }
}

TEST_P(CudaOptimizer, ANaNGradientIsSeenWhereTheCpuShowsIt) {
  std::vector<Parameter> list = {make_parameter(kind, {}, 700, generator)};
  DeviceList on_device(list);
  for (std::int64_t t = 1; t <= 2; ++t) {
    draw_gradient(list[0], t, generator);
    if (t == 1) list[0].grad.set(300, std::nan(""));
    on_device.set_gradients(list);
    step_list(on_device.views(), kind, step_number(t, kind));
    step_list(cpu_views(list), kind, step_number(t, kind));
  }
  const auto* const param = on_device.views()[0][0].as<const float>();
  for (std::int64_t i = 0; i < 700; ++i) {
    EXPECT_EQ(std::isnan(param[i]), std::isnan(list[0].param[i])) << "element " << i;
    if (!std::isnan(param[i])) {
      EXPECT_EQ(static_cast<double>(param[i]), list[0].param[i]) << "element " << i;
    }
  }
}

TEST(CudaLion, AStepOfNothingIsNone) {
  emulator::device() = {};
  Generator generator{55};
  // A moment and a gradient of zero, of either sign, and the two that cancel.
  std::vector<Parameter> list = {make_parameter({OptimizerRule::lion}, {}, 3, generator)};
  Parameter& p = list[0];
  p.param = HostTensor(DType::float32, {3}, {1.0, -0.0, 2.0});
  p.exp_avg = HostTensor(DType::float32, {3}, {0.0, -0.0, -1.0});
  p.grad = HostTensor(DType::float32, {3}, {-0.0, 0.0, 1.0});
  OptimizerStep step;
  step.beta1 = 0.5;
  step.weight_decay = 0.0;
  const std::vector<std::uint8_t> before = p.param.bytes();
  DeviceList on_device(list);
  step_list(on_device.views(), {OptimizerRule::lion}, step);
  step_list(cpu_views(list), {OptimizerRule::lion}, step);
  EXPECT_TRUE(on_device.equals(list));
  EXPECT_EQ(p.param.bytes(), before);
}

INSTANTIATE_TEST_SUITE_P(All, CudaOptimizer, step_kinds(false), kind_test_name);
INSTANTIATE_TEST_SUITE_P(Stochastic, CudaOptimizer, step_kinds(true), kind_test_name);

}  // namespace
}  // namespace qlora
