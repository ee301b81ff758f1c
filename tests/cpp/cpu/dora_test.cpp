// dora_scale and dora_scale_backward: every instruction set gives the bits of the formula in fp32.
#include "core/operations.h"
#include "support/host_tensor.h"

namespace qlora {
namespace {

class CpuDoRA : public testing::TestWithParam<DType> {
 protected:
  const DType dtype = GetParam();
  Generator generator{16};
};

// Around the kernels' registers and their runs of 1024 columns; more than a grain of work.
constexpr std::int64_t shapes[][2] = {{0, 5},  {5, 0},   {1, 1},    {3, 7},
                                      {2, 31}, {40, 64}, {9, 1030}, {33, 2100}};

float as_float(const HostTensor& tensor, std::int64_t i) { return static_cast<float>(tensor[i]); }

TEST_P(CpuDoRA, ScaleIsTheFormulaRoundedOnce) {
  for (const auto& [m, n] : shapes) {
    SCOPED_TRACE(testing::Message() << "m=" << m << " n=" << n);
    HostTensor rows = HostTensor::random(dtype, {m, n}, generator);
    HostTensor gain = HostTensor::random(DType::float32, {n}, generator);
    HostTensor addend = HostTensor::random(dtype, {m, n}, generator);
    HostTensor bias = HostTensor::random(dtype, {n}, generator), absent;
    for (HostTensor* const addend_or_not : {&addend, &absent}) {
      for (HostTensor* const bias_or_not : {&bias, &absent}) {
        HostTensor expected(dtype, {m, n});
        for (std::int64_t e = 0; e < m * n; ++e) {
          const std::int64_t j = e % n;
          volatile float value = as_float(gain, j) * as_float(rows, e);  // never fused
          if (addend_or_not == &addend) value = value + as_float(addend, e);
          if (bias_or_not == &bias) value = value + as_float(bias, j);
          expected.set(e, value);
        }
        for (const int num_threads : {1, 3}) {
          HostTensor y(dtype, {m, n});
          dora_scale(
              {rows.view(), gain.view(), addend_or_not->view(), bias_or_not->view(), y.view()},
              {.num_threads = num_threads});
          EXPECT_EQ(y.bytes(), expected.bytes());
        }
      }
    }
    HostTensor y(dtype, {m, n}), in_place = rows;
    dora_scale({rows.view(), gain.view(), addend.view(), {}, y.view()}, {});
    dora_scale({in_place.view(), gain.view(), addend.view(), {}, in_place.view()}, {});
    EXPECT_EQ(in_place.bytes(), y.bytes());
    dora_scale({rows.view(), gain.view(), addend.view(), {}, addend.view()}, {});
    EXPECT_EQ(addend.bytes(), y.bytes());
  }
}

TEST_P(CpuDoRA, BackwardScalesAndSumsInTheOrderOfTheRows) {
  for (const auto& [m, n] : shapes) {
    SCOPED_TRACE(testing::Message() << "m=" << m << " n=" << n);
    HostTensor dy = HostTensor::random(dtype, {m, n}, generator);
    HostTensor rows = HostTensor::random(dtype, {m, n}, generator);
    HostTensor gain = HostTensor::random(DType::float32, {n}, generator);
    HostTensor expected(dtype, {m, n});
    HostTensor expected_sums(DType::float32, {n}, std::vector<double>(std::size_t(n), 0.0));
    for (std::int64_t e = 0; e < m * n; ++e) {
      const std::int64_t j = e % n;
      volatile float product = as_float(dy, e) * as_float(rows, e);
      expected_sums.set(j, as_float(expected_sums, j) + product);
      expected.set(e, as_float(gain, j) * as_float(dy, e));
    }
    for (const int num_threads : {1, 3}) {
      HostTensor scaled(dtype, {m, n}), sums(DType::float32, {n});
      dora_scale_backward({dy.view(), rows.view(), gain.view(), scaled.view(), sums.view()},
                          {.num_threads = num_threads});
      EXPECT_EQ(scaled.bytes(), expected.bytes());
      EXPECT_EQ(sums.bytes(), expected_sums.bytes());
    }
    dora_scale_backward({dy.view(), {}, gain.view(), dy.view(), {}}, {});
    EXPECT_EQ(dy.bytes(), expected.bytes());
  }
}

INSTANTIATE_TEST_SUITE_P(Dtypes, CpuDoRA, float_dtypes, test_name_of);

}  // namespace
}  // namespace qlora
