// A step on state in a file has the bits of a step on state in tensors of its own.
#include <cmath>
#include <cstring>

#include "core/paged_state.h"
#include "format/nf4_layout.h"
#include "support/host_tensor.h"
#include "support/optimizer_tensors.h"
#include "support/scratch_directory.h"

namespace qlora {
namespace {

constexpr Device cpu{DeviceType::cpu, 0};

/// A parameter with the state that a plain step keeps, and its copy whose state is in pages.
struct Parameter {
  HostTensor plain, paged, grad, plain_count, paged_count;
  HostTensor exp_avg, exp_avg_absmax, exp_avg_sq, exp_avg_sq_absmax;
  std::int64_t first_element = 0;
};

HostTensor zeros(DType dtype, std::int64_t count) {
  return {dtype, {count}, std::vector<double>(static_cast<std::size_t>(count))};
}

using Case = std::tuple<OptimizerRule, bool>;

class CpuPagedOptimizerFile : public testing::TestWithParam<Case> {
 protected:
  const OptimizerRule rule = std::get<0>(GetParam());
  const bool is_8bit = std::get<1>(GetParam());

  /// Sizes in pages of `page_elements`: several small ones that share the first, one over two
  /// borders, an empty one, one that ends with its page, one that begins with its page, a last one.
  std::vector<Parameter> make_parameters(std::int64_t page_elements) {
    std::vector<Parameter> parameters;
    std::int64_t first_element = 0;
    int i = 0;
    for (const std::int64_t count :
         {std::int64_t{1}, std::int64_t{300}, std::int64_t{256}, 2 * page_elements + 77,
          std::int64_t{0}, page_elements - 3 * 256 - 512 - 256, page_elements, std::int64_t{1000},
          page_elements / 2}) {
      const DType dtype = i++ % 3 == 0 ? DType::bfloat16 : DType::float32;
      Parameter p;
      p.plain = p.paged = HostTensor::random(dtype, {count}, generator);
      p.grad = HostTensor::random(DType::float32, {count}, generator);
      p.plain_count = p.paged_count = zeros(DType::float32, 1);
      const std::int64_t blocks = ceil_divide(count, state_block_size);
      p.exp_avg = zeros(is_8bit ? DType::uint8 : DType::float32, count);
      p.exp_avg_sq = p.exp_avg;
      p.exp_avg_absmax = p.exp_avg_sq_absmax = zeros(DType::float32, blocks);
      p.first_element = first_element;
      first_element += blocks * state_block_size;
      parameters.push_back(std::move(p));
    }
    elements = first_element;
    return parameters;
  }

  OptimizerTensor plain_tensor(Parameter& p, std::int64_t number) const {
    OptimizerTensor tensor{.param = p.plain.view(),
                           .grad = p.grad.view(),
                           .state = {},
                           .step_count = p.plain_count.view(),
                           .number = number};
    tensor.state.exp_avg = p.exp_avg.view();
    if (is_8bit) tensor.state.exp_avg_absmax = p.exp_avg_absmax.view();
    if (rule == OptimizerRule::lion) return tensor;
    tensor.state.exp_avg_sq = p.exp_avg_sq.view();
    if (is_8bit) tensor.state.exp_avg_sq_absmax = p.exp_avg_sq_absmax.view();
    return tensor;
  }

  void expect_same_state(const PagedState& state, const Parameter& p) const {
    const std::vector<const HostTensor*> planes =
        is_8bit ? std::vector{&p.exp_avg, &p.exp_avg_absmax, &p.exp_avg_sq, &p.exp_avg_sq_absmax}
                : std::vector{&p.exp_avg, &p.exp_avg_sq};
    for (int i = 0; i < state.plane_count(); ++i) {
      const auto& wanted = planes[static_cast<std::size_t>(i)]->bytes();
      const ByteRange range = state.plane_range(i, p.first_element, p.plain.numel());
      ASSERT_EQ(range.bytes, static_cast<std::int64_t>(wanted.size()));
      if (range.bytes == 0) continue;
      EXPECT_EQ(std::memcmp(state.plane(i).data() + range.offset, wanted.data(), wanted.size()), 0)
          << "plane " << i;
    }
  }

  ScratchDirectory directory;
  Generator generator{43};
  std::int64_t elements = 0;
};

TEST_P(CpuPagedOptimizerFile, StepsAreThoseOfStateInMemory) {
  const ExecutionContext context{.num_threads = 2};
  // The smallest pages that there are: 4096 elements, or what a unit of scales belongs to.
  const std::int64_t page_elements = is_8bit ? 1024 * state_block_size : 4096;
  const std::int64_t moments = rule == OptimizerRule::adamw ? 2 : 1;
  const std::int64_t page_bytes =
      moments * (is_8bit ? page_elements + page_elements / 64 : 4 * page_elements);
  // 8-bit pages are 64 times as large: fewer of the budgets.
  const auto rooms =
      is_8bit ? std::vector<std::int64_t>{2, 4} : std::vector<std::int64_t>{0, 2, 3, 4};
  for (const std::int64_t room : rooms) {
    auto parameters = make_parameters(page_elements);
    PagedStateOptions options{
        .elements = elements, .page_bytes = page_bytes, .page_file = directory.path()};
    if (room > 0) options.resident_bytes = room * page_bytes;
    PagedState state(cpu, rule, is_8bit, options);
    ASSERT_EQ(state.strategy(), PagingStrategy::file);
    ASSERT_EQ(state.page_elements(), page_elements);
    ASSERT_EQ(state.page_count(), 5);
    for (int t = 1; t <= 3; ++t) {
      OptimizerStep step;
      step.maximize = t == 2;  // so that the same gradients make another step
      if (room == 2) step.rounding_seed = 17;
      std::vector<OptimizerTensor> plain;
      std::vector<PagedTensor> paged;
      std::int64_t number = 0;
      for (Parameter& p : parameters) {
        plain.push_back(plain_tensor(p, number));
        paged.push_back({.param = p.paged.view(),
                         .grad = p.grad.view(),
                         .step_count = p.paged_count.view(),
                         .first_element = p.first_element,
                         .number = number++});
      }
      if (t == 2) {  // a parameter without a gradient, which a page belongs to
        plain.erase(plain.begin() + 6);
        paged.erase(paged.begin() + 6);
      }
      optimizer_step(rule, plain, step, context);
      paged_optimizer_step(state, paged, step, context);
    }
    for (std::size_t i = 0; i < parameters.size(); ++i) {
      const Parameter& p = parameters[i];
      EXPECT_EQ(p.paged.bytes(), p.plain.bytes()) << "parameter " << i;
      EXPECT_EQ(p.paged_count[0], i == 6 ? 2.0 : 3.0) << "parameter " << i;
      expect_same_state(state, p);
    }
    EXPECT_GT(state.report().moved_to_device_bytes, 0);
    if (room > 0) {
      EXPECT_GT(state.report().moved_to_host_bytes, 0);
      EXPECT_LE(state.report().device_bytes, room * page_bytes);
    }
  }
  EXPECT_TRUE(directory.is_empty());
}

TEST_P(CpuPagedOptimizerFile, AStateThatIsTooLargeLeavesNothing) {
  const auto before = open_files();
  EXPECT_THROW(PagedState(cpu, rule, is_8bit,
                          {.elements = std::int64_t{1} << 50, .page_file = directory.path()}),
               FileError);
  EXPECT_EQ(open_files(), before);
  EXPECT_TRUE(directory.is_empty());
}

INSTANTIATE_TEST_SUITE_P(
    Rules, CpuPagedOptimizerFile,
    testing::Combine(testing::Values(OptimizerRule::adamw, OptimizerRule::lion), testing::Bool()),
    [](const auto& instance) {
      return std::string(
          optimizer_step_name(std::get<0>(instance.param), std::get<1>(instance.param)));
    });

}  // namespace
}  // namespace qlora
