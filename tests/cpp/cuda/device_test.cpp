// Every CUDA operation once, on odd shapes, in device memory of the exact size: on the emulated
// device, and on a real one by an executable of its own, which compute-sanitizer watches too
// (benchmarks/gpu_check.sh). What each kernel does in full is tested beside it, on the emulated
// device alone.
#include <cstdlib>

#include "cuda/device_memory.h"
#include "support/optimizer_tensors.h"

namespace qlora {
namespace {

using reference::Matrix;
using reference::tensor_core_sum_error;

class CudaOperations : public testing::Test {
 protected:
  Generator generator{31};

  void SetUp() override {
    const std::string reason = prepare_device();
    if (reason.empty()) return;
    const char* const is_required = std::getenv("QLORA_REQUIRE_GPU");
    if (is_required != nullptr && is_required == std::string("1")) {
      FAIL() << "QLORA_REQUIRE_GPU=1, but there is no device: " << reason;
    }
    GTEST_SKIP() << reason;
  }

  /// Integers from -2 to 2. Sums of their products are exact in fp32 as long as these tests make
  /// them: whatever the order, the bits are the same.
  HostTensor small_integers(DType dtype, Shape shape) {
    HostTensor tensor(dtype, shape);
    for (std::int64_t i = 0; i < tensor.numel(); ++i) {
      tensor.set(i, static_cast<double>(generator() % 5) - 2.0);
    }
    return tensor;
  }
};

void expect_same_bytes(const HostTensor& actual, const HostTensor& expected, const char* what) {
  EXPECT_EQ(actual.bytes(), expected.bytes()) << what;
}

struct WeightShape {
  std::int64_t n, k, block_size;
};

class CudaCodecOperations : public CudaOperations,
                            public testing::WithParamInterface<std::tuple<DType, bool>> {
 protected:
  const DType dtype = std::get<0>(GetParam());
  const bool is_nested = std::get<1>(GetParam());
};

constexpr WeightShape codec_shapes[] = {{1, 1, 32}, {51, 167, 64}, {16, 320, 128}, {3, 4099, 4096}};

TEST_P(CudaCodecOperations, QuantizeToTheCpuBits) {
  for (const auto& [n, k, block_size] : codec_shapes) {
    SCOPED_TRACE(message("[", n, ", ", k, "], block_size ", block_size));
    HostTensor w = HostTensor::random(dtype, {n, k}, generator, 0.02);
    StoredWeight expected(n, k, block_size, is_nested), actual(n, k, block_size, is_nested);
    nf4_quantize(w.view(), expected.view(), {});
    {
      OnDevice device;
      nf4_quantize(device(w), device(actual), {});
    }
    expect_same_bytes(actual.codes, expected.codes, "codes");
    expect_same_bytes(actual.absmax, expected.absmax, "absmax");
    expect_same_bytes(actual.nested_absmax, expected.nested_absmax, "nested_absmax");
    expect_same_bytes(actual.nested_offset, expected.nested_offset, "nested_offset");
  }
}

TEST_P(CudaCodecOperations, DequantizeToTheCpuBits) {
  for (const auto& [n, k, block_size] : codec_shapes) {
    SCOPED_TRACE(message("[", n, ", ", k, "], block_size ", block_size));
    StoredWeight weight = StoredWeight::random(n, k, block_size, is_nested, generator);
    HostTensor expected(dtype, {n, k}), actual = expected;
    HostTensor expected_absmax(DType::float32, {weight.block_count()});
    HostTensor actual_absmax = expected_absmax;
    nf4_dequantize(weight.view(), expected.view(), {});
    nf4_dequantize_absmax(weight.view(), expected_absmax.view(), {});
    {
      OnDevice device;
      const NF4Weight on_device = device(weight);
      nf4_dequantize(on_device, device(actual), {});
      nf4_dequantize_absmax(on_device, device(actual_absmax), {});
    }
    expect_same_bytes(actual, expected, "weight");
    expect_same_bytes(actual_absmax, expected_absmax, "absmax");
  }
}

class CudaLinearOperations : public CudaCodecOperations {
 protected:
  struct LinearShape {
    std::int64_t m;
    WeightShape w;
  };
  // One token; tails of tokens, rows and columns; rows that begin within a byte; blocks across rows;
  // more tokens than a tile.
  static constexpr LinearShape shapes[] = {
      {1, {96, 256, 64}},  {3, {33, 192, 64}},  {4, {8, 97, 32}},      {16, {64, 320, 128}},
      {17, {65, 96, 32}},  {40, {70, 130, 64}}, {70, {128, 64, 4096}}, {130, {64, 128, 64}},
      {2, {5, 4096, 512}}, {0, {4, 64, 64}},
  };
};

TEST_P(CudaLinearOperations, ForwardIsXTimesWTransposedPlusBias) {
  for (const auto& [m, shape] : shapes) {
    const auto& [n, k, block_size] = shape;
    for (const bool has_bias : {false, true}) {
      SCOPED_TRACE(message("m=", m, " n=", n, " k=", k, " block ", block_size));
      StoredWeight weight = StoredWeight::random(n, k, block_size, is_nested, generator);
      HostTensor x = HostTensor::random(dtype, {m, k}, generator), y(dtype, {m, n}), bias;
      if (has_bias) bias = HostTensor::random(dtype, {n}, generator);
      {
        OnDevice device;
        nf4_linear(device(x), device(weight), device(bias), device(y), {});
      }
      const Matrix w = transpose(weight.decode(format_of(dtype)));
      const Matrix ones(m, 1, std::vector<double>(static_cast<std::size_t>(m), 1.0));
      Matrix exact = x.matrix() * w, size = magnitude(x.matrix()) * magnitude(w);
      if (has_bias) {
        const Matrix row(1, n, bias.values());
        exact = exact + ones * row;
        size = size + ones * magnitude(row);
      }
      EXPECT_TRUE(is_rounded_from(y, exact.values, (tensor_core_sum_error(k + 1) * size).values));
    }
  }
}

TEST_P(CudaLinearOperations, GradInputIsDyTimesW) {
  for (const auto& [m, shape] : shapes) {
    const auto& [n, k, block_size] = shape;
    SCOPED_TRACE(message("m=", m, " n=", n, " k=", k, " block ", block_size));
    StoredWeight weight = StoredWeight::random(n, k, block_size, is_nested, generator);
    HostTensor dy = HostTensor::random(dtype, {m, n}, generator), dx(dtype, {m, k});
    {
      OnDevice device;
      nf4_linear_grad_input(device(dy), device(weight), device(dx), {});
    }
    const Matrix w = weight.decode(format_of(dtype));
    const Matrix size = magnitude(dy.matrix()) * magnitude(w);
    EXPECT_TRUE(
        is_rounded_from(dx, (dy.matrix() * w).values, (tensor_core_sum_error(n) * size).values));
  }
}

std::string codec_test_name(const testing::TestParamInfo<std::tuple<DType, bool>>& test) {
  return std::string(name_of(std::get<0>(test.param))) +
         (std::get<1>(test.param) ? "Nested" : "Plain");
}
INSTANTIATE_TEST_SUITE_P(All, CudaCodecOperations, testing::Combine(float_dtypes, testing::Bool()),
                         codec_test_name);
INSTANTIATE_TEST_SUITE_P(All, CudaLinearOperations, testing::Combine(float_dtypes, testing::Bool()),
                         codec_test_name);

class CudaDtypeOperations : public CudaOperations, public testing::WithParamInterface<DType> {
 protected:
  const DType dtype = GetParam();
};

TEST_P(CudaDtypeOperations, LoRAGivesTheCpuBitsOfExactSums) {
  struct LoRAShape {
    std::int64_t m, n, k, r;
  };
  for (const auto& [m, n, k, r] : {LoRAShape{1, 5, 3, 2},
                                   {3, 17, 31, 8},
                                   {33, 65, 15, 33},
                                   {70, 48, 72, 16},
                                   {5, 130, 9, 1}}) {
    SCOPED_TRACE(message("m=", m, " n=", n, " k=", k, " r=", r));
    HostTensor x = small_integers(dtype, {m, k}), dy = small_integers(dtype, {m, n});
    HostTensor a = small_integers(DType::float32, {r, k}),
               b = small_integers(DType::float32, {n, r});
    struct Results {
      HostTensor t, y, grad_a, grad_b, dx;
    };
    Results expected{HostTensor(dtype, {m, r}), small_integers(dtype, {m, n}),
                     HostTensor(DType::float32, {r, k}), HostTensor(DType::float32, {n, r}),
                     small_integers(dtype, {m, k})};
    Results actual = expected;
    const auto run = [&](Results& out, auto&& place) {
      const TensorView t = place(out.t), x_view = place(x), a_view = place(a), b_view = place(b);
      lora_forward({x_view, a_view, b_view, 0.5f, t, place(out.y)}, {});
      lora_backward({place(dy), x_view, t, a_view, b_view, 0.5f, place(out.grad_a),
                     place(out.grad_b), place(out.dx)},
                    {});
    };
    run(expected, [](HostTensor& tensor) { return tensor.view(); });
    {
      OnDevice device;
      run(actual, device);
    }
    expect_same_bytes(actual.t, expected.t, "t");
    expect_same_bytes(actual.y, expected.y, "y");
    expect_same_bytes(actual.grad_a, expected.grad_a, "grad_a");
    expect_same_bytes(actual.grad_b, expected.grad_b, "grad_b");
    expect_same_bytes(actual.dx, expected.dx, "dx");
  }
}

TEST_P(CudaDtypeOperations, DropoutGivesTheCpuBits) {
  for (const std::int64_t count : {1, 7, 1023, 5000}) {
    HostTensor x = HostTensor::random(dtype, {count}, generator), seed(DType::int64, {1});
    for (std::uint8_t& byte : seed.bytes()) byte = static_cast<std::uint8_t>(generator() % 128);
    HostTensor expected(dtype, {count}), actual = expected;
    dropout(x.view(), 0.3, seed.view(), expected.view(), {});
    {
      OnDevice device;
      dropout(device(x), 0.3, device(seed), device(actual), {});
    }
    expect_same_bytes(actual, expected, "out");
  }
}

/// A parameter with its state; what a step does not have is absent.
struct OptimizerCase {
  HostTensor param, grad, exp_avg, exp_avg_absmax, exp_avg_sq, exp_avg_sq_absmax;
};

OptimizerCase optimizer_case(OptimizerRule rule, bool is_8bit, DType dtype, std::int64_t count,
                             Generator& generator) {
  const auto zeros = [](bool is_there, DType type, std::int64_t size) {
    return is_there ? HostTensor(type, {size}, std::vector<double>(static_cast<std::size_t>(size)))
                    : HostTensor();
  };
  const DType moment = is_8bit ? DType::uint8 : DType::float32;
  const std::int64_t blocks = (count + state_block_size - 1) / state_block_size;
  const bool has_second = rule == OptimizerRule::adamw;
  OptimizerCase out{HostTensor::random(dtype, {count}, generator),
                    HostTensor::random(dtype, {count}, generator, 0.01),
                    zeros(true, moment, count),
                    zeros(is_8bit, DType::float32, blocks),
                    zeros(has_second, moment, count),
                    zeros(has_second && is_8bit, DType::float32, blocks)};
  if (is_8bit) {
    for (std::uint8_t& code : out.exp_avg.bytes()) code = 127;  // 0 in the signed map
  }
  return out;
}

TEST_P(CudaDtypeOperations, OptimizersStepAListOfTensorsToTheCpuBits) {
  for (const OptimizerRule rule : {OptimizerRule::adamw, OptimizerRule::lion}) {
    for (const bool is_8bit : {false, true}) {
      for (const bool is_stochastic : {false, true}) {
        if (is_stochastic && dtype == DType::float16) continue;
        SCOPED_TRACE(message(optimizer_step_name(rule, is_8bit),
                             is_stochastic ? ", stochastic rounding" : ""));
        std::vector<OptimizerCase> expected;
        for (const std::int64_t count : {1, 255, 256, 1000}) {
          expected.push_back(optimizer_case(rule, is_8bit, dtype, count, generator));
        }
        std::vector<OptimizerCase> actual = expected;
        const auto run = [&](std::vector<OptimizerCase>& cases, auto&& place) {
          std::vector<OptimizerTensor> tensors;
          for (OptimizerCase& c : cases) {
            OptimizerTensor& tensor = tensors.emplace_back(with_8bit_state(
                place(c.param), place(c.grad), place(c.exp_avg), place(c.exp_avg_absmax),
                place(c.exp_avg_sq), place(c.exp_avg_sq_absmax)));
            tensor.number = static_cast<std::int64_t>(tensors.size());
          }
          OptimizerStep step;
          if (is_stochastic) step.rounding_seed = 71;
          for (step.step = 1; step.step <= 2; ++step.step) {
            optimizer_step(rule, tensors, step, {});
          }
        };
        run(expected, [](HostTensor& tensor) { return tensor.view(); });
        {
          OnDevice device;
          run(actual, device);
        }
        for (std::size_t i = 0; i < actual.size(); ++i) {
          const OptimizerCase &a = actual[i], &e = expected[i];
          expect_same_bytes(a.param, e.param, "param");
          expect_same_bytes(a.exp_avg, e.exp_avg, "exp_avg");
          expect_same_bytes(a.exp_avg_absmax, e.exp_avg_absmax, "exp_avg_absmax");
          expect_same_bytes(a.exp_avg_sq, e.exp_avg_sq, "exp_avg_sq");
          expect_same_bytes(a.exp_avg_sq_absmax, e.exp_avg_sq_absmax, "exp_avg_sq_absmax");
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Dtypes, CudaDtypeOperations, float_dtypes, test_name_of);

}  // namespace
}  // namespace qlora
