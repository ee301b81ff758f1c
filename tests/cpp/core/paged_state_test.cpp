// PagedState: where the moments of a parameter are; and that a step on them is optimizer_step's.
// (cpu/paged_optimizer_file_test.cpp has steps that go from page to page.)
#include "core/paged_state.h"

#include <cstring>
#include <vector>

#include "core/paged_walk.h"
#include "format/nf4_layout.h"
#include "support/expect_error.h"
#include "support/host_tensor.h"

namespace qlora {
namespace {

constexpr Device cpu{};
constexpr std::int64_t mib = std::int64_t{1} << 20;

PagedState make(OptimizerRule rule, bool is_8bit, std::int64_t elements, std::int64_t page_bytes) {
  return {cpu, rule, is_8bit, {.elements = elements, .page_bytes = page_bytes}};
}

TEST(PagedState, HasAPlaneForEveryMomentAndItsScales) {
  const auto bytes_of = [](const PagedState& state) {
    std::vector<std::int64_t> bytes;
    for (int i = 0; i < state.plane_count(); ++i) bytes.push_back(state.plane(i).bytes());
    return bytes;
  };
  using Bytes = std::vector<std::int64_t>;
  // 1000 elements are four blocks, of which the last is kept whole.
  const PagedState adamw = make(OptimizerRule::adamw, false, 1000, mib);
  EXPECT_EQ(bytes_of(adamw), (Bytes{4096, 4096}));
  EXPECT_EQ(adamw.bytes(), 8192);
  EXPECT_EQ(bytes_of(make(OptimizerRule::lion, false, 1000, mib)), (Bytes{4096}));
  const PagedState adamw8bit = make(OptimizerRule::adamw, true, 1000, mib);
  EXPECT_EQ(bytes_of(adamw8bit), (Bytes{1024, 16, 1024, 16}));
  EXPECT_EQ(adamw8bit.bytes(), 2080);
  EXPECT_EQ(bytes_of(make(OptimizerRule::lion, true, 1000, mib)), (Bytes{1024, 16}));
  EXPECT_EQ(adamw8bit.device(), cpu);
  EXPECT_EQ(adamw8bit.rule(), OptimizerRule::adamw);
  EXPECT_EQ(adamw8bit.strategy(), PagingStrategy::ordinary);
  EXPECT_EQ(adamw8bit.elements(), 1000);
  EXPECT_TRUE(adamw8bit.is_8bit());
}

TEST(PagedState, PagesAreCutAtTheSameElementsInEveryPlane) {
  struct Case {
    OptimizerRule rule;
    bool is_8bit;
    std::int64_t page_bytes, page_elements;
  };
  for (const Case& c : {// Small pages: multiples of 4096 elements, or of 4096 bytes of scales.
                        Case{OptimizerRule::adamw, false, 32 << 10, 4096},
                        Case{OptimizerRule::adamw, false, (64 << 10) - 1, 4096},
                        Case{OptimizerRule::lion, false, 32 << 10, 8192},
                        Case{OptimizerRule::lion, true, 260 << 10, 256 << 10},
                        Case{OptimizerRule::adamw, true, 1040 << 10, 512 << 10},
                        // Large ones: multiples of 2 Mi elements.
                        Case{OptimizerRule::adamw, false, 32 * mib, 4 * mib},
                        Case{OptimizerRule::adamw, false, 47 * mib, 4 * mib},
                        Case{OptimizerRule::lion, true, 32 * mib, 30 * mib},
                        Case{OptimizerRule::adamw, true, 32 * mib, 14 * mib}}) {
    const PagedState state = make(c.rule, c.is_8bit, 2 * c.page_elements + 1, c.page_bytes);
    EXPECT_EQ(state.page_elements(), c.page_elements) << c.page_bytes;
    EXPECT_EQ(state.page_count(), 3);
    EXPECT_LE(state.page_bytes(), c.page_bytes);
    for (int i = 0; i < state.plane_count(); ++i) {
      EXPECT_EQ(state.plane(i).page_count(), 3);
      EXPECT_EQ(state.plane(i).page_range(1).offset,
                state.plane_range(i, c.page_elements, 256).offset);
    }
  }
}

TEST(PagedState, ARangeOfElementsIsARangeOfEachPlane) {
  const auto expect = [](const PagedState& state, int plane, std::int64_t first, std::int64_t count,
                         std::int64_t offset, std::int64_t bytes) {
    const ByteRange range = state.plane_range(plane, first, count);
    EXPECT_EQ(range.offset, offset);
    EXPECT_EQ(range.bytes, bytes);
  };
  const PagedState state8bit = make(OptimizerRule::adamw, true, 4096, 2 * mib);
  for (const int codes : {0, 2}) {
    expect(state8bit, codes, 512, 300, 512, 300);
    expect(state8bit, codes + 1, 512, 300, 8, 8);  // two blocks, the second one short
    expect(state8bit, codes, 768, 0, 768, 0);
    expect(state8bit, codes + 1, 768, 0, 12, 0);
  }
  const PagedState state = make(OptimizerRule::adamw, false, 4096, 2 * mib);
  for (const int plane : {0, 1}) expect(state, plane, 512, 300, 2048, 1200);
}

TEST(PagedState, ViewsCountFromWhereTheAddressesBegin) {
  PagedState state = make(OptimizerRule::adamw, true, 4096, 2 * mib);
  std::vector<std::byte> memory(4);
  const PagedState::Addresses addresses{memory.data(), memory.data() + 1, memory.data() + 2,
                                        memory.data() + 3};
  const OptimizerState views = state.state_at(addresses, 512, 1024, 700);
  EXPECT_EQ(views.exp_avg.data, memory.data() + 512);
  EXPECT_EQ(views.exp_avg_absmax.data, memory.data() + 1 + 8);
  EXPECT_EQ(views.exp_avg_sq.data, memory.data() + 2 + 512);
  EXPECT_EQ(views.exp_avg_sq_absmax.data, memory.data() + 3 + 8);
  EXPECT_EQ(views.exp_avg.shape, Shape({700}));
  EXPECT_EQ(views.exp_avg.dtype, DType::uint8);
  EXPECT_EQ(views.exp_avg_sq_absmax.shape, Shape({3}));
  EXPECT_EQ(views.exp_avg_sq_absmax.dtype, DType::float32);
  EXPECT_TRUE(views.exp_avg.is_present && views.is_8bit());
  const OptimizerState lion =
      make(OptimizerRule::lion, false, 4096, 2 * mib).state_at(addresses, 0, 256, 700);
  EXPECT_EQ(lion.exp_avg.data, memory.data() + 1024);
  EXPECT_EQ(lion.exp_avg.dtype, DType::float32);
  EXPECT_FALSE(lion.exp_avg_absmax.is_present || lion.exp_avg_sq.is_present);
}

TEST(PagedState, WhatCannotBeRightIsNamed) {
  const auto expect = [](const std::string& text, bool is_8bit, const PagedStateOptions& options) {
    expect_invalid(text, [&] { PagedState(cpu, OptimizerRule::adamw, is_8bit, options); });
  };
  expect("PagedState: elements is -1, want 0 to 72057594037927936", false, {.elements = -1});
  expect("PagedState: elements is 72057594037927937, want 0 to 72057594037927936", false,
         {.elements = (std::int64_t{1} << 56) + 1});
  expect("PagedState: page_bytes is 32767, want at least 32768", false,
         {.elements = 1, .page_bytes = (32 << 10) - 1});
  expect("PagedState: page_bytes is 0, want at least 532480", true,
         {.elements = 1, .page_bytes = 0});
  expect(
      "PagedState: resident_bytes is 65535, want at least 65536, two pages: the one in use and the "
      "one that comes",
      false, {.elements = 1 << 20, .page_bytes = 32 << 10, .resident_bytes = (64 << 10) - 1});
}

TEST(PagedState, NoElementsAreNoPages) {
  PagedState state = make(OptimizerRule::adamw, true, 0, 2 * mib);
  EXPECT_EQ(state.bytes(), 0);
  EXPECT_EQ(state.page_count(), 0);
  EXPECT_TRUE(state.make_resident(nullptr));
  paged_optimizer_step(state, {}, {}, {});
}

TEST(PagedState, MemoryThatStaysIsWalkedInOneCall) {
  PagedState state = make(OptimizerRule::lion, false, 3 * 4096, 16 << 10);
  HostTensor param(DType::float32, {5000}), grad(DType::float32, {5000});
  HostTensor none(DType::float32, {0});
  const PagedTensor tensors[] = {
      {.param = param.view(), .grad = grad.view(), .step_count = {}, .number = 4},
      {.param = none.view(),
       .grad = none.view(),
       .step_count = {},
       .first_element = 5120,
       .number = 5}};
  int calls = 0;
  walk_pages(state, tensors, nullptr, [&](std::span<const OptimizerTensor> pieces) {
    ++calls;
    ASSERT_EQ(pieces.size(), 2u);
    EXPECT_EQ(pieces[0].param.data, param.view().data);
    EXPECT_EQ(pieces[0].param.shape, Shape({5000}));
    EXPECT_EQ(pieces[0].state.exp_avg.data, state.data()[0]);
    EXPECT_EQ(pieces[0].first_element, 0);
    EXPECT_EQ(pieces[0].number, 4);
    EXPECT_EQ(pieces[1].param.numel(), 0);
    EXPECT_EQ(pieces[1].number, 5);
    EXPECT_TRUE(pieces[0].counts_step && pieces[1].counts_step);
  });
  EXPECT_EQ(calls, 1);
}

TEST(PieceOf, IsThePartOfAParameterInAPage) {
  PagedState state = make(OptimizerRule::adamw, true, 4096, 2 * mib);
  HostTensor param(DType::bfloat16, {1000}), grad(DType::float32, {1000});
  HostTensor step_count(DType::float32, {1});
  const PagedTensor tensor{.param = param.view(),
                           .grad = grad.view(),
                           .step_count = step_count.view(),
                           .first_element = 768,
                           .number = 9};
  const auto piece = [&](std::int64_t begin, std::int64_t end) {
    return piece_of(tensor, state, state.data(), 0, begin, end);
  };
  const auto* const params = static_cast<std::byte*>(param.view().data);
  const auto* const grads = static_cast<std::byte*>(grad.view().data);
  const OptimizerTensor first = piece(512, 1024), middle = piece(1024, 1536),
                        last = piece(1536, 2048);
  EXPECT_EQ(first.param.data, params);
  EXPECT_EQ(first.param.shape, Shape({256}));
  EXPECT_EQ(first.first_element, 0);
  EXPECT_FALSE(first.counts_step);
  EXPECT_EQ(middle.param.data, params + 2 * 256);
  EXPECT_EQ(middle.grad.data, grads + 4 * 256);
  EXPECT_EQ(middle.grad.shape, Shape({512}));
  EXPECT_EQ(middle.state.exp_avg.data, state.data()[0] + 1024);
  EXPECT_EQ(middle.state.exp_avg_absmax.data, state.data()[1] + 16);
  EXPECT_EQ(middle.first_element, 256);
  EXPECT_EQ(middle.number, 9);
  EXPECT_FALSE(middle.counts_step);
  EXPECT_EQ(last.param.shape, Shape({232}));
  EXPECT_EQ(last.state.exp_avg_sq_absmax.shape, Shape({1}));
  EXPECT_EQ(last.step_count.data, step_count.view().data);
  EXPECT_TRUE(last.counts_step);
}

// ---- steps

class CpuPagedState : public testing::TestWithParam<std::tuple<OptimizerRule, bool>> {
 protected:
  const OptimizerRule rule = std::get<0>(GetParam());
  const bool is_8bit = std::get<1>(GetParam());
};

TEST_P(CpuPagedState, AStepHasTheBitsOfOptimizerStep) {
  Generator generator(81);
  // Small ones that share a page, one over several, empty ones between and at the end.
  const std::int64_t page_elements = is_8bit ? 1024 * state_block_size : 4096;
  const std::vector<std::int64_t> counts = {
      1, 300, 0, 256, 2 * page_elements + 77, 0, page_elements - 1, 1000, 0};
  std::vector<HostTensor> params, grads;
  std::vector<PagedTensor> paged(counts.size());
  std::int64_t elements = 0;
  for (std::size_t i = 0; i < counts.size(); ++i) {
    const DType dtype = i % 2 == 0 ? DType::bfloat16 : DType::float32;
    params.push_back(HostTensor::random(dtype, {counts[i]}, generator));
    grads.push_back(HostTensor::random(DType::bfloat16, {counts[i]}, generator));
    paged[i].first_element = elements;
    paged[i].number = static_cast<std::int64_t>(i) + 100;
    // The state of a parameter without elements is a place, so that another may begin there.
    elements += ceil_divide(counts[i], state_block_size) * state_block_size;
  }
  elements += state_block_size;  // in which the last one begins
  PagedStateOptions options{.elements = elements};
  options.page_bytes = page_elements / state_block_size * (is_8bit ? 260 : 1024) *
                       (rule == OptimizerRule::adamw ? 2 : 1);
  PagedState state(cpu, rule, is_8bit, options);
  PagedState wanted(cpu, rule, is_8bit, options);  // its memory alone
  ASSERT_EQ(state.page_elements(), page_elements);
  ASSERT_GE(state.page_count(), 4);
  // Codes of zero are for the caller to write.
  for (PagedState* s : {&state, &wanted}) {
    if (is_8bit) std::memset(s->data()[0], 127, static_cast<std::size_t>(s->plane(0).bytes()));
  }
  std::vector<HostTensor> wanted_params = params;
  HostTensor zero(DType::float32, {1}, {0.0});
  std::vector<HostTensor> steps(counts.size(), zero), wanted_steps = steps;

  for (int call = 0; call < 4; ++call) {
    std::vector<OptimizerTensor> tensors(counts.size());
    for (std::size_t i = 0; i < counts.size(); ++i) {
      paged[i].param = params[i].view();
      paged[i].grad = grads[i].view();
      paged[i].step_count = steps[i].view();
      tensors[i] = {.param = wanted_params[i].view(),
                    .grad = grads[i].view(),
                    .state = wanted.state_at(wanted.data(), 0, paged[i].first_element, counts[i]),
                    .step_count = wanted_steps[i].view(),
                    .number = paged[i].number};
    }
    OptimizerStep step;
    if (call >= 2) step.rounding_seed = 17;
    optimizer_step(rule, tensors, step, {.num_threads = 2});
    paged_optimizer_step(state, paged, step, {.num_threads = 2});
    for (std::size_t i = 0; i < counts.size(); ++i) {
      EXPECT_EQ(params[i].bytes(), wanted_params[i].bytes()) << "tensor " << i;
      EXPECT_EQ(steps[i][0], call + 1.0) << "tensor " << i;
    }
    for (int i = 0; i < state.plane_count(); ++i) {
      const auto plane = static_cast<std::size_t>(i);
      EXPECT_EQ(0, std::memcmp(state.data()[plane], wanted.data()[plane],
                               static_cast<std::size_t>(state.plane(i).bytes())))
          << "plane " << i;
    }
  }
}

TEST_P(CpuPagedState, WhereInfWasFoundNothingIsDone) {
  Generator generator(82);
  HostTensor param = HostTensor::random(DType::float32, {300}, generator);
  HostTensor grad = HostTensor::random(DType::float32, {300}, generator);
  HostTensor step_count(DType::float32, {1}, {6.0}), found_inf(DType::float32, {1}, {1.0});
  PagedState state = make(rule, is_8bit, 300, 2 * mib);
  const PagedTensor tensor{
      .param = param.view(), .grad = grad.view(), .step_count = step_count.view()};
  const HostTensor before = param;
  OptimizerStep step;
  step.found_inf = found_inf.view();
  paged_optimizer_step(state, std::span(&tensor, 1), step, {});
  EXPECT_EQ(param.bytes(), before.bytes());
  EXPECT_EQ(step_count[0], 6.0);
  found_inf.set(0, 0.0);
  paged_optimizer_step(state, std::span(&tensor, 1), step, {});
  EXPECT_NE(param.bytes(), before.bytes());
  EXPECT_EQ(step_count[0], 7.0);
}

INSTANTIATE_TEST_SUITE_P(
    Rules, CpuPagedState,
    testing::Combine(testing::Values(OptimizerRule::adamw, OptimizerRule::lion), testing::Bool()),
    [](const auto& instance) {
      return std::string(
          optimizer_step_name(std::get<0>(instance.param), std::get<1>(instance.param)));
    });

}  // namespace
}  // namespace qlora
