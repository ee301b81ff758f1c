// Tests of optimisers' steps with any rule and kind of state.
#pragma once

#include "cuda/emulation/emulator.h"
#include "cuda/optimizer_list.h"

namespace qlora {

/// A list of all dtypes that can be, with any rule and kind of state.
class CudaOptimizer : public testing::TestWithParam<StepKind> {
 protected:
  const StepKind kind = GetParam();
  Generator generator{52};

  void SetUp() override { emulator::device() = {}; }
  void TearDown() override { EXPECT_EQ(emulator::device().live_allocations, 0); }

  std::vector<Parameter> make_list(bool has_step_count = false) {
    std::vector<Parameter> list;
    for (const DType param : {DType::float32, DType::bfloat16, DType::float16}) {
      if (kind.is_stochastic && param == DType::float16) continue;
      for (const std::int64_t size : {700, 0, 4097}) {
        list.push_back(make_parameter(
            kind, {.param = param, .grad = DType::bfloat16, .has_step_count = has_step_count}, size,
            generator));
      }
    }
    return list;
  }
};

inline std::string kind_test_name(const testing::TestParamInfo<StepKind>& test) {
  return test.param.name();
}

}  // namespace qlora
