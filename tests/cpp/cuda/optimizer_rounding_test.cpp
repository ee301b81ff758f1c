// Stochastic rounding on the emulated device: the random bits are the CPU's. (The steps of
// optimizer_test.cpp are tested with it, too.)
#include <limits>

#include "core/stochastic_rounding.h"
#include "cuda/optimizer_fixture.h"

namespace qlora {
namespace {

class CudaStochasticRounding : public CudaOptimizer {};

TEST_P(CudaStochasticRounding, TheRandomBitsAreThoseOfTheParameterAndItsElements) {
  std::vector<Parameter> list;
  for (int i = 0; i < 3; ++i) {
    list.push_back(make_parameter(kind, {.param = DType::bfloat16}, 5000, generator));
    draw_gradient(list.back(), 1, generator);
  }
  DeviceList on_device(list);
  std::vector<OptimizerTensor> expected = optimizer_tensors(cpu_views(list), kind);
  std::vector<OptimizerTensor> actual = optimizer_tensors(on_device.views(), kind);
  for (std::vector<OptimizerTensor>* tensors : {&expected, &actual}) {
    (*tensors)[0].number = RoundingStream::max_number;
    (*tensors)[0].first_element = (std::int64_t{1} << 42) - 4096;  // a carry out of 32 bits
    (*tensors)[1].number = 0;
    (*tensors)[2].first_element = 256;
  }
  OptimizerStep step = step_number(1, kind);
  for (const std::uint64_t seed : {std::uint64_t{0}, ~std::uint64_t{0}}) {
    step.rounding_seed = seed;
    optimizer_step(kind.rule, actual, step, {});
    optimizer_step(kind.rule, expected, step, {});
    ASSERT_TRUE(on_device.equals(list)) << "seed " << seed;
  }
}

TEST_P(CudaStochasticRounding, WhatIsNotANumberHasTheCpuBits) {
  std::vector<Parameter> list = {make_parameter(kind, {.param = DType::bfloat16}, 700, generator)};
  Parameter& p = list[0];
  draw_gradient(p, 1, generator);
  p.grad.set(300, std::nan(""));
  p.param.set(8, std::numeric_limits<double>::infinity());
  p.param.set(9, -std::numeric_limits<double>::infinity());
  DeviceList on_device(list);
  step_list(on_device.views(), kind, step_number(1, kind));
  step_list(cpu_views(list), kind, step_number(1, kind));
  const auto* const param = on_device.views()[0][0].as<const std::uint8_t>();
  EXPECT_TRUE(std::equal(p.param.bytes().begin(), p.param.bytes().end(), param));
  EXPECT_TRUE(std::isnan(p.param[300]));
  EXPECT_TRUE(std::isinf(p.param[8]));
}

INSTANTIATE_TEST_SUITE_P(All, CudaStochasticRounding, step_kinds(true), kind_test_name);

}  // namespace
}  // namespace qlora
