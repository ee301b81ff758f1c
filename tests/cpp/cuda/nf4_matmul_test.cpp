// Products with an NF4 weight on the emulated device, against fp64 and, bit for bit, from run to
// run; and that the planned kernel is the one that runs.
#include <cmath>
#include <cstring>

#include "core/backend.h"
#include "cuda/emulation/emulator.h"
#include "cuda/nf4_matmul_dispatch.h"
#include "cuda/nf4_matmul_few_tokens.h"
#include "cuda/nf4_matmul_few_tokens_map.h"
#include "cuda/nf4_matmul_plain.h"
#include "cuda/nf4_matmul_tiles.h"
#include "support/expect_error.h"
#include "support/stored_weight.h"

namespace qlora {
namespace {

using cuda::DeviceTraits;
using cuda::Direction;
using cuda::NF4Matmul;
using emulator::Order;
using reference::Matrix;
using reference::sum_error;

constexpr DeviceTraits h200 = {90, 132, 227 * 1024, 50 << 20};

TensorView on_cuda(TensorView view) {
  view.device = {DeviceType::cuda, 0};
  return view;
}

NF4Weight on_cuda(NF4Weight weight) {
  for (TensorView* view :
       {&weight.codes, &weight.absmax, &weight.nested_absmax, &weight.nested_offset}) {
    *view = on_cuda(*view);
  }
  return weight;
}

/// The bytes of a tensor at an address that is a multiple of 16, as CUDA's allocations are, or
/// `offset` bytes beyond one; an output is written back when this goes. It ends with the last
/// element, so that AddressSanitizer sees a step beyond.
class Placed {
 public:
  explicit Placed(HostTensor& tensor, std::size_t offset = 0)
      : tensor_(tensor), offset_(offset), memory_(new(std::align_val_t{16}) std::uint8_t[size()]) {
    std::copy(tensor.bytes().begin(), tensor.bytes().end(), memory_ + offset_);
  }
  ~Placed() {
    std::copy_n(memory_ + offset_, tensor_.bytes().size(), tensor_.bytes().begin());
    operator delete[](memory_, std::align_val_t{16});
  }
  Placed(const Placed&) = delete;
  Placed& operator=(const Placed&) = delete;

  TensorView view() {
    TensorView view = on_cuda(tensor_.view());
    if (view.is_present) view.data = memory_ + offset_;
    return view;
  }

 private:
  std::size_t size() const { return offset_ + tensor_.bytes().size(); }

  HostTensor& tensor_;
  std::size_t offset_;
  std::uint8_t* memory_;
};

struct Case {
  std::int64_t m, n, k, block_size;
  int split = 1;
};

class CudaMatmul : public testing::TestWithParam<std::tuple<DType, Direction>> {
 protected:
  void SetUp() override { emulator::device() = {}; }
  void TearDown() override { EXPECT_EQ(emulator::device().live_allocations, 0); }

  const DType dtype = std::get<0>(GetParam());
  const Direction direction = std::get<1>(GetParam());
  const bool is_forward = direction == Direction::forward;
  Generator generator{21};

  using Launch = std::function<void(const NF4Matmul&)>;

  /// Runs `launch` on random tensors at the given addresses, and returns the output's bytes.
  std::vector<std::uint8_t> expect_product(const Case& c, bool is_nested, bool has_bias,
                                           const Launch& launch, std::size_t input_offset = 0,
                                           std::size_t codes_offset = 0) {
    SCOPED_TRACE(message("m=", c.m, " n=", c.n, " k=", c.k, " block ", c.block_size, " split ",
                         c.split, is_nested ? " nested" : " plain"));
    StoredWeight weight = StoredWeight::random(c.n, c.k, c.block_size, is_nested, generator);
    const Matrix w = weight.decode(format_of(dtype));
    const Matrix right = is_forward ? transpose(w) : w;
    HostTensor input = HostTensor::random(dtype, {c.m, right.rows}, generator);
    HostTensor output(dtype, {c.m, right.columns});
    HostTensor bias;
    if (has_bias) bias = HostTensor::random(dtype, {c.n}, generator);
    {
      Placed placed_input(input, input_offset), placed_codes(weight.codes, codes_offset),
          placed_output(output);
      NF4Matmul matmul{direction, placed_input.view(), placed_output.view(), on_cuda(weight.view()),
                       on_cuda(bias.view())};
      matmul.weight.codes = placed_codes.view();
      launch(matmul);
    }
    Matrix exact = input.matrix() * right;
    Matrix size = magnitude(input.matrix()) * magnitude(right);
    if (has_bias) {
      // A bias is one more column of W, beside a column of ones in x.
      const Matrix ones(c.m, 1, std::vector<double>(static_cast<std::size_t>(c.m), 1.0));
      const Matrix row(1, c.n, bias.values());
      exact = exact + ones * row;
      size = size + ones * magnitude(row);
    }
    EXPECT_TRUE(is_rounded_from(output, exact.values, (sum_error(right.rows + 1) * size).values));
    return output.bytes();
  }

  static void launch_plain(const NF4Matmul& matmul) {
    cuda::launch_nf4_matmul_plain(matmul, nullptr);
  }

  /// With a split of the test's choice.
  Launch few_tokens(int split) const {
    return [split](const NF4Matmul& matmul) {
      ASSERT_TRUE(cuda::nf4_matmul_few_tokens_supports(matmul));
      cuda::FewTokensPlan plan = cuda::plan_few_tokens({.direction = matmul.direction,
                                                        .m = matmul.m(),
                                                        .n = matmul.weight.n,
                                                        .k = matmul.weight.k},
                                                       {});
      ASSERT_EQ(plan.split, 1);
      plan.split = split;
      plan.thread_blocks *= split;
      cuda::launch_nf4_matmul_few_tokens(matmul, plan, nullptr);
    };
  }

  static void run(const NF4Matmul& matmul) {
    if (matmul.direction == Direction::forward) {
      nf4_linear(matmul.input, matmul.weight, matmul.bias, matmul.output, {});
    } else {
      nf4_linear_grad_input(matmul.input, matmul.weight, matmul.output, {});
    }
  }
};

// ---- plain

TEST_P(CudaMatmul, PlainTakesAnyShapeAndBlock) {
  for (const Case& c : {Case{1, 1, 1, 32},
                        {1, 3, 5, 32},
                        {3, 17, 31, 64},
                        {2, 33, 97, 32},
                        {17, 34, 66, 64},
                        {2, 33, 257, 4096},
                        {5, 9, 255, 128},
                        {16, 32, 64, 256},
                        {33, 65, 129, 512}}) {
    for (const bool is_nested : {false, true}) {
      expect_product(c, is_nested, is_forward && c.n % 2 == 1, launch_plain);
    }
  }
}

TEST_P(CudaMatmul, PlainGoesRoundItsGridInEveryOrderOfTheThreads) {
  emulator::device().max_thread_blocks = 1;
  for (const Order order : {Order::ascending, Order::descending, Order::shuffled}) {
    emulator::device().order = order;
    expect_product({18, 40, 70, 32}, true, is_forward, launch_plain);
  }
}

TEST_P(CudaMatmul, PlainTakesAnyAddress) {
  const std::size_t element = dtype == DType::float32 ? 4 : 2;
  expect_product({3, 17, 62, 64}, true, false, launch_plain, element, 1);
}

// ---- few tokens

/// What the kernels for few tokens take.
class CudaFewTokens : public CudaMatmul {};

// One token; tails of tokens, rows and columns; one lane's columns; rows that are no multiple of 4;
// every tile of tokens; sums cut over thread blocks, some of them empty.
constexpr Case few_cases[] = {
    {1, 1, 32, 32},      {1, 16, 128, 64},     {3, 17, 160, 64},      {8, 33, 96, 32},
    {7, 20, 1120, 128},  {2, 5, 4224, 256, 2}, {9, 31, 256, 512},     {16, 64, 288, 64, 3},
    {12, 150, 64, 4096}, {17, 40, 160, 1024},  {32, 33, 1152, 64, 2}, {30, 300, 96, 2048, 2},
    {1, 530, 64, 64},    {5, 263, 320, 64, 4},
};

TEST_P(CudaFewTokens, AgreeWithFp64) {
  bool is_nested = false;
  for (const Case& c : few_cases) {
    is_nested = !is_nested;
    expect_product(c, is_nested, is_forward && c.m % 2 == 1, few_tokens(c.split));
  }
}

TEST_P(CudaFewTokens, GiveTheSameBitsInEveryOrderOfTheThreads) {
  for (const int split : {1, 3}) {
    std::vector<std::vector<std::uint8_t>> outputs;
    for (const Order order : {Order::ascending, Order::descending, Order::shuffled}) {
      emulator::device().order = order;
      generator.seed(5);
      outputs.push_back(
          expect_product({9, 130, 1184, 32, split}, true, is_forward, few_tokens(split)));
    }
    EXPECT_EQ(outputs[0], outputs[1]);
    EXPECT_EQ(outputs[0], outputs[2]);
  }
}

TEST_P(CudaFewTokens, ScaleOfNaNStaysWithItsBlock) {
  constexpr std::int64_t n = 20, k = 160, block_size = 32, bad_row = 17, bad_column = 64;
  StoredWeight weight = StoredWeight::random(n, k, block_size, false, generator);
  const auto first = (bad_row * k + bad_column) / block_size * 4;
  std::fill_n(weight.absmax.bytes().begin() + first, 4, std::uint8_t{0xff});
  HostTensor input = HostTensor::random(dtype, {2, is_forward ? k : n}, generator);
  const std::int64_t columns = is_forward ? n : k;
  HostTensor output(dtype, {2, columns});
  {
    Placed placed_input(input), placed_codes(weight.codes), placed_output(output);
    NF4Matmul matmul{
        direction, placed_input.view(), placed_output.view(), on_cuda(weight.view()), {}};
    matmul.weight.codes = placed_codes.view();
    few_tokens(1)(matmul);
  }
  for (std::int64_t i = 0; i < 2; ++i) {
    for (std::int64_t j = 0; j < columns; ++j) {
      const bool is_bad =
          is_forward ? j == bad_row : j >= bad_column && j < bad_column + block_size;
      EXPECT_EQ(std::isnan(output[i * columns + j]), is_bad) << i << ", " << j;
    }
  }
}

TEST_P(CudaFewTokens, ANaNTokenStaysAlone) {
  constexpr std::int64_t m = 10, n = 20, k = 160;
  StoredWeight weight = StoredWeight::random(n, k, 64, true, generator);
  HostTensor input = HostTensor::random(dtype, {m, is_forward ? k : n}, generator);
  const std::int64_t columns = is_forward ? n : k;
  input.set(3 * (is_forward ? k : n) + 2, std::nan(""));
  HostTensor output(dtype, {m, columns});
  {
    Placed placed_input(input), placed_codes(weight.codes), placed_output(output);
    NF4Matmul matmul{
        direction, placed_input.view(), placed_output.view(), on_cuda(weight.view()), {}};
    matmul.weight.codes = placed_codes.view();
    few_tokens(2)(matmul);
  }
  for (std::int64_t i = 0; i < m * columns; ++i) {
    EXPECT_EQ(std::isnan(output[i]), i / columns == 3) << i / columns << ", " << i % columns;
  }
}

TEST_P(CudaFewTokens, RefuseMoreTokensThanPlanned) {
  HostTensor input(dtype, {33, 64}), output(dtype, {33, 64});
  StoredWeight weight(64, 64, 64, false);
  expect_invalid(std::string(operation_of(direction)) +
                     ", few tokens: there are 33 tokens, the plan has tiles for 32",
                 [&] {
                   cuda::launch_nf4_matmul_few_tokens(
                       {direction, input.view(), output.view(), weight.view(), {}},
                       {.token_tiles = 4, .split = 1, .thread_blocks = 1}, nullptr);
                 });
}

// ---- the backend

/// The name of the kernel that a call queues first: the emulated device refuses it, and the error
/// names it.
std::string kernel_of(const std::function<void()>& call) {
  emulator::device().launch_error = cudaErrorIllegalAddress;
  try {
    call();
  } catch (const CudaError& error) {
    emulator::device().launch_error = cudaSuccess;
    const std::string text = error.what();
    return text.substr(0, text.find(": cudaError"));
  }
  return "none";
}

TEST_P(CudaMatmul, TheBackendRunsWhatIsPlanned) {
  const std::string operation = operation_of(direction);
  const bool is_half = dtype != DType::float32;
  for (const std::int64_t m : {1, 8, 32}) {
    expect_product({m, 48, 96, 64}, true, is_forward, [&](const NF4Matmul& matmul) {
      EXPECT_EQ(kernel_of([&] { run(matmul); }),
                operation + (is_half ? ", few tokens" : ", plain"));
      run(matmul);
    });
  }
  expect_product({33, 48, 96, 64}, true, is_forward, [&](const NF4Matmul& matmul) {
    const bool is_tiles = cuda::nf4_matmul_tiles_supports(matmul, h200);
    EXPECT_EQ(kernel_of([&] { run(matmul); }), operation + (is_tiles ? "" : ", plain"));
    run(matmul);
  });
  for (const Case& c : {Case{1, 48, 80, 64}, {1, 16, 33, 64}}) {  // k is no multiple of 32
    expect_product(c, true, false, [&](const NF4Matmul& matmul) {
      EXPECT_EQ(kernel_of([&] { run(matmul); }), operation + ", plain");
      run(matmul);
    });
  }
}

TEST_P(CudaMatmul, WithoutMemoryForPartialSumsNothingIsQueued) {
  if (dtype == DType::float32) GTEST_SKIP() << "the plain kernel has none";
  for (const std::int64_t m : {1, 40}) {
    StoredWeight weight(is_forward ? 64 : 4096, is_forward ? 4096 : 64, 64, false);
    HostTensor input(dtype, {m, 4096}), output(dtype, {m, 64});
    emulator::device().is_out_of_memory = true;
    EXPECT_THROW(
        run({direction, on_cuda(input.view()), on_cuda(output.view()), on_cuda(weight.view()), {}}),
        OutOfMemory)
        << m << " tokens";
    EXPECT_EQ(emulator::device().launch_count, 0);
  }
}

TEST_P(CudaMatmul, TheBackendTakesAnyAddress) {
  const std::size_t element = dtype == DType::float32 ? 4 : 2;
  const auto run_plain = [&](const NF4Matmul& matmul) {
    EXPECT_EQ(kernel_of([&] { run(matmul); }), std::string(operation_of(direction)) + ", plain");
    run(matmul);
  };
  expect_product({2, 16, 64, 64}, true, false, run_plain, element, 0);
  expect_product({2, 16, 64, 64}, true, false, run_plain, 0, 1);
}

TEST_P(CudaMatmul, SizesOfZeroActAsOnTheCpu) {
  for (const Case& c : {Case{0, 4, 64, 64}, {3, 0, 64, 64}, {3, 4, 0, 64}}) {
    expect_product(c, true, is_forward, run);
  }
}

std::string name_of_case(const testing::TestParamInfo<std::tuple<DType, Direction>>& info) {
  return std::string(name_of(std::get<0>(info.param))) +
         (std::get<1>(info.param) == Direction::forward ? "Forward" : "GradInput");
}

constexpr auto directions = {Direction::forward, Direction::grad_input};
INSTANTIATE_TEST_SUITE_P(All, CudaMatmul,
                         testing::Combine(float_dtypes, testing::ValuesIn(directions)),
                         name_of_case);
INSTANTIATE_TEST_SUITE_P(All, CudaFewTokens,
                         testing::Combine(testing::Values(DType::bfloat16, DType::float16),
                                          testing::ValuesIn(directions)),
                         name_of_case);

TEST(CudaMatmulStrategy, IsThePlansAdvice) {
  emulator::device() = {};
  const auto strategy = [](std::int64_t m, std::int64_t k, DType dtype,
                           bool is_grad_input = false) {
    return cuda_nf4_matmul_strategy({is_grad_input, m, 4096, k, dtype, 64}, 0);
  };
  for (const bool is_grad_input : {false, true}) {
    EXPECT_EQ(strategy(1, 4096, DType::bfloat16, is_grad_input), "few_tokens");
    EXPECT_EQ(strategy(32, 4096, DType::float16, is_grad_input), "few_tokens");
    EXPECT_EQ(strategy(4096, 4096, DType::bfloat16, is_grad_input), "workspace");
    EXPECT_EQ(strategy(4, 4096, DType::float32, is_grad_input), "plain");
    EXPECT_EQ(strategy(5, 4096, DType::float32, is_grad_input), "workspace");
    EXPECT_EQ(strategy(4, 4095, DType::bfloat16, is_grad_input), "plain");
  }
}

}  // namespace
}  // namespace qlora
