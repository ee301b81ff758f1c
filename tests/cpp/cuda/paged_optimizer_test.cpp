// The optimisers' steps on state in pages, on emulated streams that run as late, and in as bad an
// order, as the events between them allow. The bits are those of optimizer_step on the CPU.
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <optional>
#include <utility>

#include "core/paged_state.h"
#include "cuda/emulation/emulator.h"
#include "cuda/emulation/streams.h"
#include "cuda/optimizer_list.h"
#include "support/expect_error.h"

namespace qlora {
namespace {

using emulator::device;
using emulator::Kind;
using emulator::streams;
using emulator::Turn;
using emulator::Work;

/// A caller's stream, on the current device.
class Stream {
 public:
  Stream() { cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking); }
  ~Stream() { cudaStreamDestroy(stream_); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  operator cudaStream_t() const { return stream_; }

 private:
  cudaStream_t stream_ = nullptr;
};

constexpr StepKind adamw_stochastic{.is_stochastic = true};

struct Settings {
  StepKind kind;
  PagingStrategy strategy;
  std::optional<std::int64_t> resident_pages;

  /// As small as they come: of 4,096 elements, or 262,144 in 8 bits.
  std::int64_t page_bytes() const {
    const std::int64_t moments = kind.rule == OptimizerRule::adamw ? 2 : 1;
    return moments * (kind.is_8bit ? 1024 * 260 : 16 * 1024);
  }

  friend std::ostream& operator<<(std::ostream& out, const Settings& settings) {
    out << settings.kind.name() << settings.strategy;
    return settings.resident_pages ? out << *settings.resident_pages << "Pages" : out << "Freely";
  }
};

// Small parameters share pages, large ones go over their ends, and some have no elements.

const std::vector<std::int64_t> sizes_32bit = {5, 300, 9000, 0, 1, 777, 4097, 1500, 2, 0};
const std::vector<std::int64_t> sizes_8bit = {1000, 263000, 0, 5, 262700, 3};

/// A list of parameters whose state is in pages, and the same list on the CPU.
class PagedList {
 public:
  PagedList(const Settings& settings, bool has_step_count)
      : settings_(settings), generator_(17), list_(make_list(has_step_count)), on_device_(list_) {
    std::int64_t element = 0;
    for (const Views& views : on_device_.views()) {
      tensors_.push_back(
          {.param = views[0],
           .grad = views[1],
           .step_count = views[6],
           .first_element = element,
           .number = 1000 + static_cast<std::int64_t>(tensors_.size())});  // as step_list's
      element += ceil_divide(views[0].numel(), state_block_size) * state_block_size;
    }
    PagedStateOptions options{.elements = std::max(element, tensors_.back().first_element + 1),
                              .page_bytes = settings.page_bytes(),
                              .strategy = settings.strategy};
    if (settings.resident_pages) {
      options.resident_bytes = *settings.resident_pages * options.page_bytes;
    }
    state_ = std::make_unique<PagedState>(Device{DeviceType::cuda, 0}, settings.kind.rule,
                                          settings.kind.is_8bit, options);
  }

  PagedState& state() { return *state_; }
  void give_back() { state_.reset(); }
  std::int64_t page_count() const { return state_->page_count(); }

  /// Queues the step.
  void step(std::int64_t t, cudaStream_t stream) {
    paged_optimizer_step(*state_, tensors_, step_number(t, settings_.kind), {.stream = stream});
  }
  void step_on_cpu(std::int64_t t) {
    step_list(cpu_views(list_), settings_.kind, step_number(t, settings_.kind));
  }

  /// Compares all bytes with the CPU's, when the device is done.
  testing::AssertionResult equals_cpu() {
    for (std::size_t i = 0; i < list_.size(); ++i) {
      Parameter& p = list_[i];
      if (!is_same(tensors_[i].param.data, p.param)) return differs("param", i);
      if (!is_same(tensors_[i].step_count.data, p.step_count)) return differs("step_count", i);
      std::vector<const HostTensor*> planes;
      for (const HostTensor* plane : {&p.exp_avg, &p.absmax, &p.exp_avg_sq, &p.absmax_sq}) {
        if (!plane->bytes().empty()) planes.push_back(plane);
      }
      EXPECT_TRUE(planes.empty() || std::cmp_equal(planes.size(), state_->plane_count()));
      for (int plane = 0; std::cmp_less(plane, planes.size()); ++plane) {
        const ByteRange range =
            state_->plane_range(plane, tensors_[i].first_element, p.param.numel());
        if (!is_same(state_->plane(plane).data() + range.offset,
                     *planes[static_cast<std::size_t>(plane)])) {
          return differs(message("plane ", plane).c_str(), i);
        }
      }
    }
    return testing::AssertionSuccess();
  }

 private:
  std::vector<Parameter> make_list(bool has_step_count) {
    std::vector<Parameter> list;
    for (const std::int64_t size : settings_.kind.is_8bit ? sizes_8bit : sizes_32bit) {
      const DType dtype = list.size() % 2 == 0 ? DType::float32 : DType::bfloat16;
      list.push_back(make_parameter(
          settings_.kind,
          {.param = dtype, .grad = DType::bfloat16, .has_step_count = has_step_count}, size,
          generator_));
      draw_gradient(list.back(), 1, generator_);
    }
    return list;
  }

  static bool is_same(const void* memory, const HostTensor& wanted) {
    return wanted.bytes().empty() ||
           std::memcmp(memory, wanted.bytes().data(), wanted.bytes().size()) == 0;
  }
  testing::AssertionResult differs(const char* what, std::size_t i) {
    return testing::AssertionFailure()
           << what << " of parameter " << i << " (" << list_[i].param.numel() << " elements)";
  }

  Settings settings_;
  Generator generator_;
  std::vector<Parameter> list_;
  DeviceList on_device_;
  std::vector<PagedTensor> tensors_;
  std::unique_ptr<PagedState> state_;
};

class CudaPagedOptimizerTest : public testing::Test {
 protected:
  CudaPagedOptimizerTest() { reset(); }
  void TearDown() override {
    EXPECT_EQ(streams().live, 0);
    EXPECT_EQ(device().live_allocations, 0);
    EXPECT_EQ(device().failure, "");
    reset();
  }
  static void reset() {
    device() = {};
    streams() = {};
  }
};

class CudaPagedOptimizer : public CudaPagedOptimizerTest,
                           public testing::WithParamInterface<Settings> {
 protected:
  bool is_resident(const PagedList& list) const {
    const Settings& settings = GetParam();
    return settings.strategy == PagingStrategy::managed &&
           settings.resident_pages.value_or(list.page_count()) >= list.page_count();
  }
};

TEST_P(CudaPagedOptimizer, StepsGiveTheCpusBitsHoweverLateAndInWhicheverOrderStreamsRun) {
  const unsigned seeds = GetParam().kind.is_8bit ? 1 : 8;
  for (const Turn turn : {Turn::oldest_stream, Turn::newest_stream, Turn::shuffled}) {
    for (unsigned seed = 1; seed <= (turn == Turn::shuffled ? seeds : 1); ++seed) {
      streams().turn = turn;
      streams().seed = seed;
      const Stream stream;
      PagedList list(GetParam(), seed % 2 == 0);
      ASSERT_GT(list.page_count(), GetParam().kind.is_8bit ? 2 : 4);
      device().synchronize_count = 0;
      for (std::int64_t t = 1; t <= 3; ++t) list.step(t, stream);
      EXPECT_EQ(device().synchronize_count, 0) << "a step waited for the device";
      for (std::int64_t t = 1; t <= 3; ++t) list.step_on_cpu(t);
      cudaStreamSynchronize(stream);
      ASSERT_TRUE(list.equals_cpu()) << "turn " << static_cast<int>(turn) << ", seed " << seed;
    }
  }
}

TEST_P(CudaPagedOptimizer, AStepIsOneLaunchOrOneForEachPage) {
  const Stream stream;
  PagedList list(GetParam(), false);
  list.step(1, stream);
  EXPECT_EQ(device().launch_count, is_resident(list) ? 1 : list.page_count());
}

TEST_P(CudaPagedOptimizer, APageIsAskedForBeforeTheWorkOnTheOneBeforeAndGoesBackAfterItsOwn) {
  const Stream stream;
  PagedList list(GetParam(), false);
  PagedState& state = list.state();
  const auto page_of = [&](const Work& work) {
    for (int i = 0; i < state.plane_count(); ++i) {
      const PagedBuffer& plane = state.plane(i);
      const auto offset = static_cast<const std::byte*>(work.memory) - plane.data();
      if (offset >= 0 && offset < plane.bytes()) return offset / plane.page_bytes();
    }
    return std::int64_t{-1};
  };
  list.step(1, stream);
  streams().queued.clear();
  list.step(2, stream);
  std::vector<int> came(static_cast<std::size_t>(list.page_count() + 1)), went(came);
  std::int64_t worked = 0;
  for (const Work& work : streams().queued) {
    const std::int64_t page = page_of(work);
    if (work.kind == Kind::kernel) {
      const std::int64_t next = std::min(worked + 1, list.page_count() - 1);
      if (!is_resident(list)) {
        EXPECT_EQ(came[static_cast<std::size_t>(next)], state.plane_count()) << "page " << next;
      }
      ++worked;
    } else if (work.kind == Kind::prefetch_to_device || work.kind == Kind::copy_to_device) {
      ++came[static_cast<std::size_t>(page)];
    } else {
      EXPECT_EQ(page, worked - 1) << "goes back after its own work and before any other";
      ++went[static_cast<std::size_t>(page)];
    }
  }
  if (is_resident(list)) {
    EXPECT_EQ(came[0], state.plane_count());
    EXPECT_EQ(streams().queued.size(), static_cast<std::size_t>(1 + state.plane_count()));
    return;
  }
  EXPECT_EQ(worked, list.page_count());
  if (GetParam().strategy == PagingStrategy::managed && !GetParam().resident_pages) return;
  const std::int64_t slots = std::min<std::int64_t>(3, GetParam().resident_pages.value_or(3));
  const std::int64_t staying =
      GetParam().strategy == PagingStrategy::managed ? *GetParam().resident_pages - slots : 0;
  for (std::int64_t page = 0; page < list.page_count(); ++page) {
    EXPECT_EQ(went[static_cast<std::size_t>(page)], page < staying ? 0 : state.plane_count());
  }
}

TEST_P(CudaPagedOptimizer, TheBudgetIsKeptAndADeviceThatHasNoMoreEvictsNothing) {
  if (!GetParam().resident_pages) GTEST_SKIP() << "there is none";
  constexpr std::size_t scratch_bytes = 1 << 20;

  const auto budget =
      static_cast<std::size_t>(*GetParam().resident_pages * GetParam().page_bytes());
  for (unsigned seed = 1; seed <= (GetParam().kind.is_8bit ? 1 : 10); ++seed) {
    streams() = {};
    streams().turn = Turn::shuffled;
    streams().seed = seed;
    device().memory_bytes = budget + scratch_bytes;
    const Stream stream;
    PagedList list(GetParam(), true);
    for (std::int64_t t = 1; t <= 2; ++t) list.step(t, stream);
    for (std::int64_t t = 1; t <= 2; ++t) list.step_on_cpu(t);
    cudaStreamSynchronize(stream);
    EXPECT_TRUE(list.equals_cpu());
    EXPECT_LE(streams().peak_managed_on_device_bytes, budget);
    EXPECT_EQ(streams().evicted_bytes, 0u);
    EXPECT_LE(list.state().report().device_bytes, static_cast<std::int64_t>(budget));
  }
}

TEST_P(CudaPagedOptimizer, AResidentStepCanBeRecordedAndAnotherIsRefusedByName) {
  const Stream stream;
  PagedList list(GetParam(), true);
  device().is_capturing = true;
  const std::size_t queued = streams().queued.size();
  if (is_resident(list)) {
    list.step(1, stream);
    EXPECT_EQ(streams().queued.size(), queued + 2);  // two kernels
    EXPECT_EQ(device().memory_info_count, 0);
    list.step_on_cpu(1);
  } else {
    expect_error<Unsupported>(
        "PagedBuffer.begin: the stream records a CUDA graph, but pages move from one launch to the "
        "next, which a graph would not repeat",
        [&] { list.step(1, stream); });
    EXPECT_EQ(streams().queued.size(), queued);
  }
  EXPECT_EQ(device().broken_captures, 0);
  device().is_capturing = false;
  list.state().join(stream);
  cudaStreamSynchronize(stream);
  EXPECT_TRUE(list.equals_cpu());
}

TEST_P(CudaPagedOptimizer, ItsMemoryIsGivenBackWhenTheWorkIsDone) {
  for (const Turn turn : {Turn::oldest_stream, Turn::newest_stream}) {
    streams().turn = turn;
    const Stream stream;
    PagedList list(GetParam(), true);
    list.step(1, stream);
    list.give_back();  // the emulator's kernels would write to memory that is gone
    EXPECT_EQ(streams().live, 1) << "the caller's stream";
    cudaStreamSynchronize(stream);
    EXPECT_EQ(device().live_allocations, 0);
  }
}

TEST_P(CudaPagedOptimizer, AForkedChildFreesNothing) {
  const Stream stream;
  PagedList list(GetParam(), true);
  list.step(1, stream);
  const pid_t child = fork();
  if (child == 0) {
    const int live = streams().live, allocations = device().live_allocations;
    device().synchronize_count = 0;
    list.give_back();
    _exit(device().synchronize_count == 0 && streams().live == live &&
                  device().live_allocations == allocations
              ? 0
              : 1);
  }
  int status = -1;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
}

/// Fails call after call of a step for want of memory. Either nothing has changed, and the step can be
/// taken again, or it is right.
TEST_P(CudaPagedOptimizer, WhereverMemoryRunsOutAStepIsTakenWholeOrNotAtAll) {
  if (GetParam().kind.is_8bit) GTEST_SKIP() << "as in 32 bits, and slow";
  for (const bool has_step_count : {false, true}) {
    int thrown = 0, calls = 0;
    for (bool is_over = false; !is_over; ++calls) {
      const Stream stream;
      PagedList list(GetParam(), has_step_count);
      list.step(1, stream);
      list.step_on_cpu(1);
      streams().calls_until_failure = calls;
      bool is_taken = true;
      try {
        list.step(2, stream);
      } catch (const OutOfMemory&) {
        is_taken = false;
        ++thrown;
      }
      is_over = streams().calls_until_failure >= 0;
      streams().calls_until_failure = -1;
      if (!is_taken) {
        list.state().join(stream);
        cudaStreamSynchronize(stream);
        ASSERT_TRUE(list.equals_cpu()) << "at call " << calls;
        list.step(2, stream);
      }
      list.step_on_cpu(2);
      list.step(3, stream);
      list.step_on_cpu(3);
      cudaStreamSynchronize(stream);
      ASSERT_TRUE(list.equals_cpu()) << "at call " << calls;
      ASSERT_LT(calls, 100);
    }
    EXPECT_EQ(thrown, has_step_count ? 1 : 0) << "of the memory for rules";
    EXPECT_GT(calls, GetParam().strategy == PagingStrategy::managed ? 1 : thrown);
  }
}

constexpr StepKind lion_32bit{OptimizerRule::lion, false}, lion_8bit{OptimizerRule::lion, true};

INSTANTIATE_TEST_SUITE_P(All, CudaPagedOptimizer,
                         testing::Values(Settings{StepKind{}, PagingStrategy::managed, {}},
                                         Settings{StepKind{}, PagingStrategy::managed, 2},
                                         Settings{StepKind{}, PagingStrategy::managed, 3},
                                         Settings{StepKind{}, PagingStrategy::managed, 5},
                                         Settings{StepKind{}, PagingStrategy::managed, 8},
                                         Settings{StepKind{}, PagingStrategy::pinned, {}},
                                         Settings{StepKind{}, PagingStrategy::pinned, 2},
                                         Settings{adamw_stochastic, PagingStrategy::managed, {}},
                                         Settings{adamw_stochastic, PagingStrategy::managed, 3},
                                         Settings{adamw_stochastic, PagingStrategy::pinned, 2},
                                         Settings{lion_32bit, PagingStrategy::managed, {}},
                                         Settings{lion_32bit, PagingStrategy::managed, 3},
                                         Settings{lion_32bit, PagingStrategy::pinned, {}},
                                         Settings{adamw_8bit, PagingStrategy::managed, {}},
                                         Settings{adamw_8bit, PagingStrategy::managed, 2},
                                         Settings{adamw_8bit, PagingStrategy::managed, 3},
                                         Settings{adamw_8bit, PagingStrategy::pinned, 2},
                                         Settings{lion_8bit, PagingStrategy::managed, 2}),
                         [](const auto& test) { return message(test.param); });

TEST_F(CudaPagedOptimizerTest, WithoutABudgetAStateLargerThanTheDeviceIsSteppedPageByPage) {
  for (const bool evicts : {true, false}) {
    const Stream stream;
    device().memory_bytes = 3 * 16 * 2048;
    device().evicts_managed_memory = evicts;
    PagedList list({StepKind{}, PagingStrategy::managed, {}}, false);
    device().launch_count = 0;
    for (std::int64_t t = 1; t <= 3; ++t) {
      list.step(t, stream);
      list.step_on_cpu(t);
      cudaStreamSynchronize(stream);
    }
    EXPECT_EQ(device().launch_count, 3 * list.page_count());
    EXPECT_EQ(list.state().report().refused_bytes == 0, evicts);
    EXPECT_GE(streams().evicted_bytes, evicts ? 1u : 0u);
    EXPECT_TRUE(list.equals_cpu());
  }
}

}  // namespace
}  // namespace qlora
