// The tensor-core kernel for the middle, on the emulated device, against fp64 products with the
// decoded weight.
#include "cuda/nf4_matmul_tiles.h"

#include "cuda/emulation/emulator.h"
#include "support/expect_error.h"
#include "support/stored_weight.h"

namespace qlora::cuda {
namespace {

using emulator::Order;
using reference::Matrix;
using reference::sum_error;
using tiles::Plan;

struct ProductShape {
  std::int64_t m, n, k, block_size;
  int tokens;  // of a tile
  int splits;
};

class CudaMatmulTiles : public testing::TestWithParam<std::tuple<DType, Direction>> {
 protected:
  void SetUp() override { emulator::device() = {}; }
  void TearDown() override { EXPECT_EQ(emulator::device().live_allocations, 0); }

  const DType dtype = std::get<0>(GetParam());
  const Direction direction = std::get<1>(GetParam());
  const bool is_forward = direction == Direction::forward;
  Generator generator{17};

  std::int64_t reduced_of(const ProductShape& shape) const {
    return is_forward ? shape.k : shape.n;
  }
  std::int64_t columns_of(const ProductShape& shape) const {
    return is_forward ? shape.n : shape.k;
  }

  Plan plan_of(const ProductShape& shape) const {
    return tiles::make_plan(shape.m, columns_of(shape), reduced_of(shape), shape.tokens,
                            shape.splits);
  }

  /// The output of one launch.
  HostTensor multiply(const ProductShape& shape, HostTensor& input, StoredWeight& weight,
                      HostTensor& bias) {
    HostTensor output(dtype, {shape.m, columns_of(shape)});
    const NF4Matmul matmul{direction, input.view(), output.view(), weight.view(), bias.view()};
    launch_nf4_matmul_tiles(matmul, plan_of(shape), nullptr);
    return output;
  }

  void expect_right(const ProductShape& shape, bool is_nested, bool has_bias = false) {
    SCOPED_TRACE(message("m=", shape.m, " n=", shape.n, " k=", shape.k, " block ", shape.block_size,
                         is_nested ? " nested, " : " plain, ", shape.tokens, " tokens, ",
                         shape.splits, " splits"));
    StoredWeight weight =
        StoredWeight::random(shape.n, shape.k, shape.block_size, is_nested, generator);
    HostTensor input = HostTensor::random(dtype, {shape.m, reduced_of(shape)}, generator);
    HostTensor bias;
    if (has_bias) bias = HostTensor::random(dtype, {columns_of(shape)}, generator);
    const HostTensor output = multiply(shape, input, weight, bias);

    const Matrix stored = weight.decode(format_of(dtype));
    const Matrix w = is_forward ? transpose(stored) : stored;
    Matrix exact = input.matrix() * w;
    Matrix size = magnitude(input.matrix()) * magnitude(w);
    if (has_bias) {
      // A bias is one more term of every sum, beside a column of ones in the input.
      const Matrix ones(shape.m, 1, std::vector<double>(static_cast<std::size_t>(shape.m), 1.0));
      const Matrix row(1, columns_of(shape), bias.values());
      exact = exact + ones * row;
      size = size + ones * magnitude(row);
    }
    EXPECT_TRUE(is_rounded_from(output, exact.values,
                                (sum_error(reduced_of(shape) + has_bias) * size).values));
  }
};

// Two tiles of tokens and of columns, the last of each cut short; a last stage of half a stage; more
// stages than the pipeline is long, and fewer; an odd m; blocks that straddle rows.
TEST_P(CudaMatmulTiles, AgreesWithTheReference) {
  for (const bool is_nested : {false, true}) {
    expect_right({70, 136, 96, 64, 64, 1}, is_nested);
    expect_right({3, 40, 352, 32, 64, 1}, is_nested);
    expect_right({131, 8, 32, 64, 128, 1}, is_nested);
  }
  expect_right({1, 328, 160, 128, 64, 1}, true);
  expect_right({65, 24, 64, 64, 128, 1}, true);
}

TEST_P(CudaMatmulTiles, TakesEveryBlockSize) {
  for (const std::int64_t block_size : {32, 64, 128, 256, 512, 1024, 2048, 4096}) {
    for (const bool is_nested : {false, true}) {
      expect_right({2, 72, 96, block_size, 64, 1}, is_nested);
    }
  }
}

TEST_P(CudaMatmulTiles, AddsPartialSumsOfSplits) {
  expect_right({5, 136, 352, 64, 64, 2}, true);
  expect_right({66, 328, 96, 32, 128, 3}, false);
  expect_right({2, 328, 328 / 32 * 32, 64, 64, 8}, true);
}

TEST_P(CudaMatmulTiles, RunsInEveryOrderOfTheThreads) {
  for (const Order order : {Order::ascending, Order::descending, Order::shuffled}) {
    emulator::device().order = order;
    expect_right({9, 136, 160, 64, 64, 1}, true);
    expect_right({9, 72, 160, 32, 128, 2}, false);
  }
}

TEST_P(CudaMatmulTiles, GivesTheSameBitsInEveryOrderOfTheThreads) {
  const ProductShape shape{9, 136, 160, 64, 64, 2};
  StoredWeight weight = StoredWeight::random(shape.n, shape.k, shape.block_size, true, generator);
  HostTensor input = HostTensor::random(dtype, {shape.m, reduced_of(shape)}, generator);
  HostTensor no_bias;
  const HostTensor first = multiply(shape, input, weight, no_bias);
  emulator::device().order = Order::shuffled;
  EXPECT_EQ(multiply(shape, input, weight, no_bias).bytes(), first.bytes());
}

TEST_P(CudaMatmulTiles, ForwardTakesAnyNumberOfColumnsAndABias) {
  if (!is_forward) GTEST_SKIP() << "the gradient has no bias, and its columns are a multiple of 32";
  for (const std::int64_t n : {1, 7, 30, 133}) {
    for (const int splits : {1, 2}) {
      expect_right({5, n, 160, 64, 64, splits}, true, false);
      expect_right({5, n, 160, 64, 64, splits}, true, true);
    }
  }
  expect_right({6, 136, 64, 64, 64, 1}, false, true);
}

TEST_P(CudaMatmulTiles, WritesOutputsThatAreNotAligned) {
  const ProductShape shape{3, 32, 64, 64, 64, 1};
  StoredWeight weight = StoredWeight::random(shape.n, shape.k, shape.block_size, true, generator);
  HostTensor input = HostTensor::random(dtype, {shape.m, reduced_of(shape)}, generator);
  HostTensor no_bias;
  const HostTensor expected = multiply(shape, input, weight, no_bias);
  HostTensor memory(DType::uint8, {static_cast<std::int64_t>(expected.bytes().size()) + 2});
  TensorView output = memory.view();
  output.data = memory.bytes().data() + 2;
  output.dtype = dtype;
  output.shape = {shape.m, columns_of(shape)};
  launch_nf4_matmul_tiles({direction, input.view(), output, weight.view(), {}}, plan_of(shape),
                          nullptr);
  EXPECT_TRUE(
      std::equal(expected.bytes().begin(), expected.bytes().end(), memory.bytes().begin() + 2));
}

// Where there is no token or weight, zeros are multiplied: an Inf or NaN beside them must not meet
// them, nor spread.
TEST_P(CudaMatmulTiles, AScaleOfNaNSpoilsOnlyItsOwnSums) {
  const ProductShape shape{2, 40, 96, 32, 64, 1};
  StoredWeight weight = StoredWeight::random(shape.n, shape.k, shape.block_size, false, generator);
  constexpr std::int64_t bad_row = 39, bad_block = 3 * bad_row + 2;  // columns 64 to 95, the last
  std::fill_n(weight.absmax.bytes().begin() + 4 * bad_block, 4, std::uint8_t{0xff});
  HostTensor input = HostTensor::random(dtype, {shape.m, reduced_of(shape)}, generator);
  HostTensor no_bias;
  const HostTensor output = multiply(shape, input, weight, no_bias);
  for (std::int64_t i = 0; i < output.numel(); ++i) {
    const std::int64_t column = i % columns_of(shape);
    EXPECT_EQ(std::isnan(output[i]), is_forward ? column == bad_row : column >= 64) << i;
  }
}

TEST_P(CudaMatmulTiles, LaunchesWithAPlanForTheDevice) {
  const ProductShape shape{70, 136, 544, 64, 0, 0};
  StoredWeight weight = StoredWeight::random(shape.n, shape.k, shape.block_size, true, generator);
  HostTensor input = HostTensor::random(dtype, {shape.m, reduced_of(shape)}, generator);
  HostTensor output(dtype, {shape.m, columns_of(shape)});
  const NF4Matmul matmul{direction, input.view(), output.view(), weight.view(), {}};
  const DeviceTraits device{90, 132, 227 * 1024, 60 << 20};
  launch_nf4_matmul_tiles(matmul, device, nullptr);
  const Matrix stored = weight.decode(format_of(dtype));
  const Matrix w = is_forward ? transpose(stored) : stored;
  EXPECT_TRUE(is_rounded_from(
      output, (input.matrix() * w).values,
      (sum_error(reduced_of(shape)) * (magnitude(input.matrix()) * magnitude(w))).values));
}

TEST_P(CudaMatmulTiles, SaysWhatItTakes) {
  alignas(16) static std::byte memory[64];
  const auto tensor = [&](DType type, Shape shape, int offset = 0) {
    TensorView view;
    view.data = memory + offset;
    view.dtype = type;
    view.shape = shape;
    view.is_present = true;
    return view;
  };
  const auto takes = [&](std::int64_t m, std::int64_t n, std::int64_t k, DType type,
                         int input_offset = 0, int codes_offset = 0) {
    const std::int64_t reduced = is_forward ? k : n, columns = is_forward ? n : k;
    NF4Weight weight;
    weight.codes = tensor(DType::uint8, {n * k / 2}, codes_offset);
    weight.n = n;
    weight.k = k;
    return NF4Matmul{direction,
                     tensor(type, {m, reduced}, input_offset),
                     tensor(type, {m, columns}, 2),
                     weight,
                     {}};
  };
  const DeviceTraits device{90, 132, 227 * 1024, 60 << 20};
  EXPECT_TRUE(nf4_matmul_tiles_supports(takes(70, 136, 192, dtype), device));
  EXPECT_TRUE(nf4_matmul_tiles_supports(takes(1, 8, 32, dtype), device));
  EXPECT_EQ(nf4_matmul_tiles_supports(takes(70, 133, 192, dtype), device), is_forward);
  EXPECT_FALSE(nf4_matmul_tiles_supports(takes(70, 136, 192, DType::float32), device));
  EXPECT_FALSE(nf4_matmul_tiles_supports(takes(70, 136, 176, dtype), device));
  EXPECT_FALSE(nf4_matmul_tiles_supports(takes(70, 136, 192, dtype, 2), device));
  EXPECT_FALSE(nf4_matmul_tiles_supports(takes(70, 136, 192, dtype, 0, 8), device));
  EXPECT_FALSE(nf4_matmul_tiles_supports(takes(70, 136, 192, dtype), {75, 80, 64 * 1024, 0}));
  EXPECT_FALSE(nf4_matmul_tiles_supports(takes(70, 136, 192, dtype), {90, 132, 40 * 1024, 0}));
  EXPECT_THROW(launch_nf4_matmul_tiles(takes(70, 136, 176, dtype), device, nullptr), Unsupported);
}

INSTANTIATE_TEST_SUITE_P(All, CudaMatmulTiles,
                         testing::Combine(testing::Values(DType::bfloat16, DType::float16),
                                          testing::Values(Direction::forward,
                                                          Direction::grad_input)),
                         [](const auto& test) {
                           return std::string(name_of(std::get<0>(test.param))) +
                                  (std::get<1>(test.param) == Direction::forward ? "Forward"
                                                                                 : "GradInput");
                         });

}  // namespace
}  // namespace qlora::cuda
