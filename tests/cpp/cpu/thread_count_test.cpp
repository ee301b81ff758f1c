// Every operation gives the same bits for any number of threads. The sizes are such that seven
// threads have work.
#include "core/operations.h"
#include "support/optimizer_tensors.h"
#include "support/stored_weight.h"

namespace qlora {
namespace {

using Bytes = std::vector<std::uint8_t>;

class CpuThreadCount : public testing::TestWithParam<DType> {
 protected:
  const DType dtype = GetParam();

  /// `run` makes its inputs from the generator, calls an operation and returns its outputs' bytes.
  template <typename Run>
  void expect_equal_bits(Run&& run) {
    const auto outputs_with = [&](int num_threads) {
      Generator generator(27);
      return run(generator, ExecutionContext{.num_threads = num_threads});
    };
    const std::vector<Bytes> once = outputs_with(1);
    for (const int threads : {2, 3, 7}) {
      EXPECT_EQ(outputs_with(threads), once) << threads << " threads";
    }
  }
};

TEST_P(CpuThreadCount, DoesNotChangeTheCodec) {
  for (const bool is_nested : {false, true}) {
    expect_equal_bits([&](Generator& generator, const ExecutionContext& context) {
      HostTensor w = HostTensor::random(dtype, {601, 401}, generator), out(dtype, {601, 401});
      StoredWeight weight(601, 401, 32, is_nested);
      nf4_quantize(w.view(), weight.view(), context);
      nf4_dequantize(weight.view(), out.view(), context);
      return std::vector<Bytes>{weight.codes.bytes(), weight.absmax.bytes(),
                                weight.nested_absmax.bytes(), weight.nested_offset.bytes(),
                                out.bytes()};
    });
  }
}

TEST_P(CpuThreadCount, DoesNotChangeTheLinearLayer) {
  // Rows of no whole chunks; of whole ones, which SIMD kernels take; so long that a thread may get an
  // odd number of them.
  for (const std::int64_t k : {499, 576, 5120}) {
    for (const std::int64_t m : {1, 2, 3, 4, 8, 9, 17, 40}) {
      expect_equal_bits([&](Generator& generator, const ExecutionContext& context) {
        constexpr std::int64_t n = 209;
        StoredWeight weight = StoredWeight::random(n, k, 64, true, generator);
        HostTensor x = HostTensor::random(dtype, {m, k}, generator), y(dtype, {m, n});
        HostTensor bias = HostTensor::random(dtype, {n}, generator), dx(dtype, {m, k});
        nf4_linear(x.view(), weight.view(), bias.view(), y.view(), context);
        nf4_linear_grad_input(y.view(), weight.view(), dx.view(), context);
        return std::vector<Bytes>{y.bytes(), dx.bytes()};
      });
    }
  }
}

TEST_P(CpuThreadCount, DoesNotChangeLoRA) {
  // Few tokens and many may take different paths.
  for (const std::int64_t m : {5, 60, 130}) {
    expect_equal_bits([&, m](Generator& generator, const ExecutionContext& context) {
      constexpr std::int64_t n = 2500, k = 3600, r = 17;
      HostTensor x = HostTensor::random(dtype, {m, k}, generator), t(dtype, {m, r});
      HostTensor lora_a = HostTensor::random(DType::float32, {r, k}, generator);
      HostTensor lora_b = HostTensor::random(DType::float32, {n, r}, generator);
      HostTensor y = HostTensor::random(dtype, {m, n}, generator);
      HostTensor dx = HostTensor::random(dtype, {m, k}, generator);
      HostTensor grad_a(DType::float32, {r, k}), grad_b(DType::float32, {n, r});
      lora_forward({x.view(), lora_a.view(), lora_b.view(), 2.0f, t.view(), y.view()}, context);
      lora_backward({y.view(), x.view(), t.view(), lora_a.view(), lora_b.view(), 2.0f,
                     grad_a.view(), grad_b.view(), dx.view()},
                    context);
      return std::vector<Bytes>{t.bytes(), y.bytes(), grad_a.bytes(), grad_b.bytes(), dx.bytes()};
    });
  }
}

TEST_P(CpuThreadCount, DoesNotChangeAdamW) {
  expect_equal_bits([&](Generator& generator, const ExecutionContext& context) {
    constexpr std::int64_t count = 150001, blocks = (count + 255) / 256;
    HostTensor param = HostTensor::random(dtype, {count}, generator), param8bit = param;
    HostTensor grad = HostTensor::random(dtype, {count}, generator);
    HostTensor m(DType::float32, {count}, std::vector<double>(count, 0.0)), v = m;
    HostTensor codes(DType::uint8, {count}, std::vector<double>(count, 127.0));
    HostTensor codes_sq(DType::uint8, {count}, std::vector<double>(count, 0.0));
    HostTensor absmax(DType::float32, {blocks}, std::vector<double>(blocks, 0.0));
    HostTensor absmax_sq = absmax;
    const OptimizerTensor tensor = with_32bit_state(param.view(), grad.view(), m.view(), v.view());
    const OptimizerTensor tensor8bit =
        with_8bit_state(param8bit.view(), grad.view(), codes.view(), absmax.view(), codes_sq.view(),
                        absmax_sq.view());
    adamw_step(std::span(&tensor, 1), {}, context);
    adamw_step(std::span(&tensor8bit, 1), {}, context);
    return std::vector<Bytes>{param.bytes(), m.bytes(),      v.bytes(),        param8bit.bytes(),
                              codes.bytes(), absmax.bytes(), codes_sq.bytes(), absmax_sq.bytes()};
  });
}

INSTANTIATE_TEST_SUITE_P(Dtypes, CpuThreadCount, float_dtypes, test_name_of);

}  // namespace
}  // namespace qlora
