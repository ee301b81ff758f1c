// The CUDA backend's PagedBuffer on emulated streams that run as late, and in as bad an order, as the
// events between them allow (emulation/streams.h).
#include "core/paged_buffer.h"

#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <set>
#include <utility>

#include "cuda/emulation/emulator.h"
#include "cuda/emulation/streams.h"
#include "format/nf4_layout.h"
#include "support/expect_error.h"

namespace qlora {
namespace {

using emulator::device;
using emulator::Kind;
using emulator::streams;
using emulator::Turn;
using emulator::Work;

constexpr std::int64_t page_bytes = PagedBufferOptions::page_unit;
constexpr std::int64_t bytes = 6 * page_bytes + 1024;  // seven pages, the last one short
constexpr std::int64_t page_count = 7;

/// The stream of a caller, on the current device.
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

class CudaPagedBufferTest : public testing::Test {
 protected:
  CudaPagedBufferTest() { reset(); }
  void TearDown() override {
    EXPECT_EQ(streams().live, 0);
    EXPECT_EQ(device().live_allocations, 0);
    reset();
  }
  static void reset() {
    device() = {};
    streams() = {};
  }
};

struct Settings {
  PagingStrategy strategy;
  std::optional<std::int64_t> resident_pages;

  friend std::ostream& operator<<(std::ostream& out, const Settings& settings) {
    out << settings.strategy;
    return settings.resident_pages ? out << *settings.resident_pages << "Pages" : out << "Freely";
  }
};

std::unique_ptr<PagedBuffer> make(const Settings& settings) {
  PagedBufferOptions options{
      .bytes = bytes, .page_bytes = page_bytes, .strategy = settings.strategy};
  if (settings.resident_pages) options.resident_bytes = *settings.resident_pages * page_bytes;
  return make_paged_buffer({DeviceType::cuda, 0}, options);
}

/// Waits for what making the buffer has queued.
void settle(PagedBuffer& buffer, cudaStream_t stream) {
  buffer.join(stream);
  cudaStreamSynchronize(stream);
}

std::unique_ptr<PagedBuffer> make_settled(const Settings& settings, cudaStream_t stream) {
  auto buffer = make(settings);
  settle(*buffer, stream);
  return buffer;
}

bool is_all_zeros(const PagedBuffer& buffer) {
  return std::all_of(buffer.data(), buffer.data() + buffer.bytes(),
                     [](std::byte value) { return value == std::byte{0}; });
}

/// What an optimiser would do to a page: it depends on what was there, on the place and on the step.
void change(std::byte* memory, const ByteRange& range, int step) {
  for (std::int64_t i = 0; i < range.bytes; i += 64) {
    const auto old = std::to_integer<unsigned>(memory[i]);
    memory[i] = std::byte(3 * old + static_cast<unsigned>((range.offset + i) / 64 + step));
  }
}

/// A step over all pages, queued on `stream`.
void walk(PagedBuffer& buffer, cudaStream_t stream, int step) {
  for (std::int64_t page = 0; page < buffer.page_count(); ++page) {
    const ByteRange range = buffer.page_range(page);
    std::byte* const memory = buffer.begin(page, stream);
    emulator::queue_kernel(stream, buffer.data() + range.offset,
                           static_cast<std::size_t>(range.bytes),
                           [=] { change(memory, range, step); });
    buffer.end(page, stream);
  }
  buffer.join(stream);
}

std::vector<std::byte> expected_after(int steps, std::byte first = {}) {
  std::vector<std::byte> memory(static_cast<std::size_t>(bytes), first);
  for (int step = 0; step < steps; ++step) {
    for (std::int64_t offset = 0; offset < bytes; offset += page_bytes) {
      change(memory.data() + offset, {offset, std::min(page_bytes, bytes - offset)}, step);
    }
  }
  return memory;
}

class CudaPaging : public CudaPagedBufferTest, public testing::WithParamInterface<Settings> {
 protected:
  std::int64_t page_of(const PagedBuffer& buffer, const Work& work) const {
    return (static_cast<const std::byte*>(work.memory) - buffer.data()) / page_bytes;
  }
};

TEST_P(CudaPaging, StepsGiveTheSameBytesHoweverLateAndInWhicheverOrderStreamsRun) {
  for (const Turn turn : {Turn::oldest_stream, Turn::newest_stream, Turn::shuffled}) {
    for (unsigned seed = 1; seed <= (turn == Turn::shuffled ? 20 : 1); ++seed) {
      streams().turn = turn;
      streams().seed = seed;
      device().synchronize_count = 0;
      const Stream stream;
      const auto buffer = make(GetParam());
      ASSERT_EQ(buffer->page_count(), page_count);
      for (int step = 0; step < 3; ++step) walk(*buffer, stream, step);
      EXPECT_EQ(device().synchronize_count, 0) << "a step waited for the device";
      cudaStreamSynchronize(stream);
      EXPECT_EQ(0, std::memcmp(buffer->data(), expected_after(3).data(),
                               static_cast<std::size_t>(bytes)));
    }
  }
}

TEST_P(CudaPaging, WhatComesNextIsAskedForBeforeTheWorkOnAPage) {
  const Stream stream;
  const auto buffer = make(GetParam());
  streams().queued.clear();
  walk(*buffer, stream, 0);
  std::vector<bool> is_asked(static_cast<std::size_t>(page_count));
  std::int64_t worked = 0;
  for (const Work& work : streams().queued) {
    const auto page = static_cast<std::size_t>(page_of(*buffer, work));
    if (work.kind == Kind::prefetch_to_device || work.kind == Kind::copy_to_device) {
      EXPECT_FALSE(is_asked[page]) << "page " << page << " was asked for twice";
      is_asked[page] = true;
    } else if (work.kind == Kind::kernel) {
      EXPECT_TRUE(is_asked[std::min(page + 1, is_asked.size() - 1)]) << "at page " << page;
      ++worked;
    }
  }
  EXPECT_EQ(worked, page_count);
}

TEST_P(CudaPaging, APageArrivesBeforeTheWorkOnItAndLeavesAfter) {
  for (unsigned seed = 1; seed <= 10; ++seed) {
    streams() = {};
    streams().turn = Turn::shuffled;
    streams().seed = seed;
    const Stream stream;
    const auto buffer = make_settled(GetParam(), stream);
    streams().done.clear();
    walk(*buffer, stream, 0);
    cudaStreamSynchronize(stream);
    enum class State { away, here, worked_on, gone };
    std::vector<State> states(static_cast<std::size_t>(page_count), State::away);
    for (const Work& work : streams().done) {
      State& state = states[static_cast<std::size_t>(page_of(*buffer, work))];
      switch (work.kind) {
        case Kind::copy_to_device:
        case Kind::prefetch_to_device:
          EXPECT_EQ(state, State::away);
          state = State::here;
          break;
        case Kind::kernel:
          EXPECT_EQ(state, State::here);
          state = State::worked_on;
          break;
        case Kind::copy_to_host:
        case Kind::prefetch_to_host:
          EXPECT_EQ(state, State::worked_on);
          state = State::gone;
          break;
        case Kind::set_bytes: ADD_FAILURE(); break;
      }
    }
    for (const State state : states) EXPECT_GE(state, State::worked_on);
  }
}

TEST_P(CudaPaging, TheBudgetIsKept) {
  if (!GetParam().resident_pages) GTEST_SKIP() << "there is none";
  const std::int64_t budget = *GetParam().resident_pages * page_bytes;
  for (unsigned seed = 1; seed <= 20; ++seed) {
    streams() = {};
    streams().turn = Turn::shuffled;
    streams().seed = seed;
    const Stream stream;
    const auto buffer = make(GetParam());
    buffer->prefetch_to_device({0, bytes}, stream);
    for (int step = 0; step < 2; ++step) walk(*buffer, stream, step);
    buffer->begin(5, stream);
    buffer->end(5, stream);
    buffer->begin(1, stream);
    buffer->prefetch_to_device({0, bytes}, stream);
    buffer->end(1, stream);
    buffer->join(stream);
    cudaStreamSynchronize(stream);
    if (buffer->strategy() == PagingStrategy::managed) {
      EXPECT_LE(streams().peak_managed_on_device_bytes, static_cast<std::size_t>(budget));
    }
    EXPECT_LE(buffer->report().device_bytes, budget);
  }
}

TEST_P(CudaPaging, TheAccountAddsUp) {
  const Stream stream;
  const auto buffer = make(GetParam());
  const auto expect_sum = [&] {
    const PagedBufferReport report = buffer->report();
    EXPECT_EQ(report.unknown_bytes + report.host_bytes + report.device_bytes, bytes);
  };
  expect_sum();
  const PagedBufferReport fresh = buffer->report();
  EXPECT_EQ(fresh.unknown_bytes, 0);
  EXPECT_EQ(fresh.moved_to_device_bytes, buffer->strategy() == PagingStrategy::managed ? bytes : 0);
  EXPECT_EQ(fresh.moved_to_device_bytes - fresh.moved_to_host_bytes, fresh.device_bytes);
  walk(*buffer, stream, 0);
  expect_sum();
  const PagedBufferReport report = buffer->report();
  EXPECT_EQ(report.moved_to_device_bytes - fresh.moved_to_device_bytes, fresh.host_bytes);
  EXPECT_EQ(report.moved_to_device_bytes - report.moved_to_host_bytes, report.device_bytes);
  for (int i = 0; i < 2; ++i) {  // the second time they are there already
    buffer->prefetch_to_host({0, bytes}, stream);
    EXPECT_EQ(buffer->report().host_bytes, bytes);
    EXPECT_EQ(buffer->report().moved_to_host_bytes, report.moved_to_device_bytes);
  }
  EXPECT_EQ(buffer->report().refused_bytes, 0);
  cudaStreamSynchronize(stream);
}

TEST_P(CudaPaging, AFailureAtAnyCallOfConstructionLeavesNothing) {
  int failures = 0;
  for (int calls = 0; streams().calls_until_failure < 0; ++calls) {
    streams().calls_until_failure = calls;
    try {
      make(GetParam());  // with a prefetch that was refused
    } catch (const std::exception&) {
      ++failures;
    }
    EXPECT_EQ(streams().live, 0) << "at call " << calls;
    EXPECT_EQ(device().live_allocations, 0) << "at call " << calls;
    ASSERT_LT(calls, 100);
  }
  EXPECT_GT(failures, 8);
}

TEST_P(CudaPaging, ItIsZerosOnceAStreamHasJoined) {
  for (const Turn turn : {Turn::oldest_stream, Turn::newest_stream}) {
    streams().turn = turn;
    const auto buffer = make(GetParam());  // its streams are older than the caller's
    const Stream stream;
    settle(*buffer, stream);
    EXPECT_TRUE(is_all_zeros(*buffer));
  }
}

TEST_P(CudaPaging, ZerosComeBeforeAPageThatIsAskedForIsWritten) {
  for (unsigned seed = 1; seed <= 10; ++seed) {
    streams().turn = Turn::shuffled;
    streams().seed = seed;
    const Stream stream;
    const auto buffer = make(GetParam());
    buffer->prefetch_to_host({0, 3 * page_bytes}, stream);
    buffer->prefetch_to_device({2 * page_bytes, 3 * page_bytes}, stream);
    const ByteRange range = buffer->page_range(4);
    std::byte* const memory = buffer->begin(4, stream);
    emulator::queue_kernel(stream, buffer->data() + range.offset, 1,
                           [=] { change(memory, range, 1); });
    buffer->end(4, stream);
    settle(*buffer, stream);
    std::vector<std::byte> expected(static_cast<std::size_t>(bytes));
    change(expected.data() + range.offset, range, 1);
    EXPECT_EQ(0, std::memcmp(buffer->data(), expected.data(), expected.size()));
  }
}

TEST_P(CudaPaging, ItIsFreedWhileItsPagesAreOnTheirWay) {
  const Stream stream;
  auto buffer = make(GetParam());
  buffer->begin(0, stream);
  buffer->end(0, stream);
  buffer->begin(1, stream);
  buffer.reset();  // the emulator would see copies to memory that is gone
  cudaStreamSynchronize(stream);
}

TEST_P(CudaPaging, ItIsMadeAndFreedWhileSomebodyRecordsAGraph) {
  const Stream stream;
  auto used = make(GetParam());
  used->begin(0, stream);
  used->end(0, stream);
  device().is_capturing = true;
  auto fresh = make(GetParam());
  used.reset();
  fresh.reset();
  EXPECT_EQ(device().broken_captures, 0);
  EXPECT_EQ(device().capture_mode, cudaStreamCaptureModeGlobal);
  device().is_capturing = false;
}

TEST_P(CudaPaging, APageComesAfterWhatTheCallersStreamWrote) {
  for (const Turn turn : {Turn::oldest_stream, Turn::newest_stream}) {
    streams().turn = turn;
    const auto buffer = make(GetParam());  // its streams are older than the caller's
    const Stream stream;
    buffer->join(stream);
    emulator::queue_kernel(stream, buffer->data(), 1, [memory = buffer->data()] {
      std::memset(memory, 5, static_cast<std::size_t>(bytes));
    });
    walk(*buffer, stream, 0);
    cudaStreamSynchronize(stream);
    EXPECT_EQ(0, std::memcmp(buffer->data(), expected_after(1, std::byte{5}).data(),
                             static_cast<std::size_t>(bytes)));
  }
}

TEST_P(CudaPaging, APageThatCameAheadIsWhatTheHostWroteSince) {
  const Stream stream;
  const auto buffer = make(GetParam());
  for (std::int64_t page = 0; page < 2; ++page) {  // a walk that ends: page 2 has come for nothing
    buffer->begin(page, stream);
    buffer->end(page, stream);
  }
  buffer->join(stream);
  cudaStreamSynchronize(stream);
  std::memset(buffer->data(), 0, static_cast<std::size_t>(bytes));
  walk(*buffer, stream, 0);
  cudaStreamSynchronize(stream);
  EXPECT_EQ(0,
            std::memcmp(buffer->data(), expected_after(1).data(), static_cast<std::size_t>(bytes)));
}

TEST_P(CudaPaging, OfTwoRequestsTheLaterOneCounts) {
  if (GetParam().strategy != PagingStrategy::managed) GTEST_SKIP() << "the host keeps a copy";
  for (const Turn turn : {Turn::oldest_stream, Turn::newest_stream}) {
    streams().turn = turn;
    const auto buffer = make(GetParam());  // its streams are older than the caller's
    const Stream stream;
    buffer->prefetch_to_device({0, bytes}, stream);
    const std::int64_t device_bytes = buffer->report().device_bytes;
    EXPECT_GT(device_bytes, 0);
    buffer->prefetch_to_host({0, bytes}, stream);
    buffer->join(stream);
    cudaStreamSynchronize(stream);
    EXPECT_EQ(streams().managed_on_device_bytes, 0u);
    buffer->prefetch_to_host({0, bytes}, stream);
    buffer->prefetch_to_device({0, bytes}, stream);
    buffer->join(stream);
    cudaStreamSynchronize(stream);
    EXPECT_EQ(streams().managed_on_device_bytes,
              static_cast<std::size_t>(ceil_divide(device_bytes, page_bytes) * page_bytes));
  }
}

TEST_P(CudaPaging, PagesAreWorkedOnInAnyOrder) {
  for (unsigned seed = 1; seed <= 10; ++seed) {
    streams().turn = Turn::shuffled;
    streams().seed = seed;
    const Stream stream;
    const auto buffer = make(GetParam());
    for (const std::int64_t page : {3, 0, 0, 6, 2, 5, 1, 4}) {
      const ByteRange range = buffer->page_range(page);
      if (page == 6) buffer->prefetch_to_host({0, 3 * page_bytes}, stream);
      if (page == 5) buffer->prefetch_to_device({page_bytes, 2 * page_bytes}, stream);
      std::byte* const memory = buffer->begin(page, stream);
      emulator::queue_kernel(stream, buffer->data() + range.offset, 1,
                             [=] { change(memory, range, static_cast<int>(page)); });
      buffer->end(page, stream);
    }
    buffer->join(stream);
    cudaStreamSynchronize(stream);
    std::vector<std::byte> expected(static_cast<std::size_t>(bytes));
    for (const std::int64_t page : {0, 0, 1, 2, 3, 4, 5, 6}) {
      const ByteRange range = buffer->page_range(page);
      change(expected.data() + range.offset, range, static_cast<int>(page));
    }
    EXPECT_EQ(0, std::memcmp(buffer->data(), expected.data(), expected.size()));
  }
}

INSTANTIATE_TEST_SUITE_P(All, CudaPaging,
                         testing::Values(Settings{PagingStrategy::managed, std::nullopt},
                                         Settings{PagingStrategy::managed, 2},
                                         Settings{PagingStrategy::managed, 3},
                                         Settings{PagingStrategy::managed, 5},
                                         Settings{PagingStrategy::managed, 7},
                                         Settings{PagingStrategy::pinned, std::nullopt},
                                         Settings{PagingStrategy::pinned, 2}),
                         [](const auto& test) { return message(test.param); });

TEST_F(CudaPagedBufferTest, TheStrategyIsManagedWhereTheDeviceCanAndElsePinned) {
  EXPECT_EQ(make({PagingStrategy::automatic, {}})->strategy(), PagingStrategy::managed);
  streams().is_access_exclusive = true;
  EXPECT_EQ(make({PagingStrategy::automatic, {}})->strategy(), PagingStrategy::pinned);
  expect_error<Unsupported>(
      "PagedBuffer: cuda:0 has no managed memory that the host can use at the same time (so with "
      "WSL2 and some virtual GPUs); use strategy pinned",
      [] { make({PagingStrategy::managed, {}}); });
  streams() = {};
  streams().is_managed_missing = true;
  EXPECT_EQ(make({PagingStrategy::automatic, {}})->strategy(), PagingStrategy::pinned);
  expect_invalid("PagedBuffer: strategy is ordinary, on cuda:0 want automatic, managed or pinned",
                 [] { make({PagingStrategy::ordinary, {}}); });
}

TEST_F(CudaPagedBufferTest, GuestsAreAdvisedToTheHostAndNothingElseIs) {
  make({PagingStrategy::managed, {}});
  EXPECT_EQ(streams().advice, std::vector{cudaMemAdviseSetAccessedBy});
  streams().advice.clear();
  make({PagingStrategy::managed, 5});
  EXPECT_EQ(streams().advice,
            (std::vector{cudaMemAdviseSetAccessedBy, cudaMemAdviseSetPreferredLocation}));
}

TEST_F(CudaPagedBufferTest, WithABudgetTheFirstPagesStay) {
  const Stream stream;
  const auto buffer = make({PagingStrategy::managed, 5});
  for (int step = 0; step < 3; ++step) walk(*buffer, stream, step);
  EXPECT_EQ(buffer->report().device_bytes, 2 * page_bytes);  // 5, less the three slots
  EXPECT_EQ(buffer->report().moved_to_host_bytes,
            4 * (bytes - 2 * page_bytes));  // and once of their zeros
  cudaStreamSynchronize(stream);
  EXPECT_EQ(streams().managed_on_device_bytes, static_cast<std::size_t>(2 * page_bytes));
  EXPECT_TRUE(emulator::is_on_device(buffer->data(), 2 * page_bytes));
}

TEST_F(CudaPagedBufferTest, WithABudgetForAllOfItOneRequestMakesItResident) {
  for (const Turn turn : {Turn::oldest_stream, Turn::newest_stream}) {
    streams().turn = turn;
    const auto buffer = make({PagingStrategy::managed, 7});  // its streams are older
    const Stream stream;
    settle(*buffer, stream);
    buffer->prefetch_to_host({0, bytes}, stream);
    streams().queued.clear();
    for (int step = 0; step < 2; ++step) {
      ASSERT_TRUE(buffer->make_resident(stream));
      emulator::queue_kernel(stream, buffer->data(), bytes, [&] {
        EXPECT_TRUE(emulator::is_on_device(buffer->data(), bytes));
        for (std::int64_t page = 0; page < page_count; ++page) {
          const ByteRange range = buffer->page_range(page);
          change(buffer->data() + range.offset, range, step);
        }
      });
      cudaStreamSynchronize(stream);
    }
    ASSERT_EQ(streams().queued.size(), 4u);
    EXPECT_EQ(streams().queued[0].kind, Kind::prefetch_to_device);
    EXPECT_EQ(streams().queued[0].bytes, static_cast<std::size_t>(bytes));
    EXPECT_EQ(buffer->report().device_bytes, bytes);
    EXPECT_EQ(device().memory_info_count, 0);
    EXPECT_EQ(
        0, std::memcmp(buffer->data(), expected_after(2).data(), static_cast<std::size_t>(bytes)));
  }
}

TEST_F(CudaPagedBufferTest, ASmallerBudgetOrPinnedMemoryIsNotResident) {
  const Stream stream;
  for (const Settings& settings : {Settings{PagingStrategy::managed, 5},
                                   {PagingStrategy::pinned, {}},
                                   {PagingStrategy::pinned, 2}}) {
    const auto buffer = make(settings);
    streams().queued.clear();
    EXPECT_FALSE(buffer->make_resident(stream));
    EXPECT_TRUE(streams().queued.empty());
  }
}

TEST_F(CudaPagedBufferTest, APageInUseIsNotMadeResident) {
  const Stream stream;
  const auto buffer = make({PagingStrategy::managed, {}});
  buffer->begin(2, stream);
  expect_invalid("PagedBuffer.make_resident: page 2 is in use; end it first",
                 [&] { buffer->make_resident(stream); });
  buffer->end(2, stream);
}

/// Takes the device's memory but for `free` bytes.
class Others {
 public:
  explicit Others(std::int64_t free) {
    std::size_t before = 0, total = 0;
    cudaMemGetInfo(&before, &total);
    cudaMalloc(&memory_, before - static_cast<std::size_t>(free));
  }
  ~Others() { cudaFree(memory_); }
  Others(const Others&) = delete;
  Others& operator=(const Others&) = delete;

 private:
  void* memory_ = nullptr;
};

TEST_F(CudaPagedBufferTest, WithoutABudgetItIsResidentWhereThereIsRoomAndTwoPagesMore) {
  device().memory_bytes = 40 * page_bytes;
  const Stream stream;
  const auto buffer = make_settled({PagingStrategy::managed, {}}, stream);
  const auto is_resident = [&](std::int64_t free, std::int64_t companion_bytes = 0) {
    const Others others(free);
    return buffer->make_resident(stream, companion_bytes);
  };
  // All of it is there.
  EXPECT_TRUE(is_resident(2 * page_bytes));
  EXPECT_FALSE(is_resident(2 * page_bytes - 1));
  EXPECT_TRUE(is_resident(2 * page_bytes, bytes));
  buffer->prefetch_to_host({0, 3 * page_bytes}, stream);
  settle(*buffer, stream);
  // And as much of its companions.
  EXPECT_FALSE(is_resident(5 * page_bytes - 1));
  EXPECT_FALSE(is_resident(8 * page_bytes - 1, bytes));
  EXPECT_TRUE(is_resident(8 * page_bytes, bytes));
}

TEST_F(CudaPagedBufferTest, MoreThanTheDeviceHasIsNeverResident) {
  device().memory_bytes = 12 * page_bytes;
  const Stream stream;
  const auto buffer = make_settled({PagingStrategy::managed, {}}, stream);
  EXPECT_TRUE(buffer->make_resident(stream));
  EXPECT_FALSE(buffer->make_resident(stream, bytes));
}

TEST_F(CudaPagedBufferTest, PagesThatAreStillToBecomeZerosAreNotThereYet) {
  device().memory_bytes = 40 * page_bytes;
  const Stream stream;
  const auto buffer = make({PagingStrategy::managed, {}});
  EXPECT_EQ(buffer->report().device_bytes, bytes);
  {
    const Others others(bytes + 2 * page_bytes - 1);
    EXPECT_FALSE(buffer->make_resident(stream));
  }
  EXPECT_TRUE(buffer->make_resident(stream));
}

TEST_F(CudaPagedBufferTest, ItIsMadeResidentAgainAfterTheDriverMovedItOut) {
  device().memory_bytes = 12 * page_bytes;
  const Stream stream;
  const auto buffer = make_settled({PagingStrategy::managed, {}}, stream);
  {
    void* memory = nullptr;
    cudaMalloc(&memory, 10 * page_bytes);
    EXPECT_FALSE(buffer->make_resident(stream));
    cudaFree(memory);
  }
  EXPECT_EQ(streams().evicted_bytes, static_cast<std::size_t>(5 * page_bytes));
  EXPECT_TRUE(buffer->make_resident(stream));
  cudaStreamSynchronize(stream);
  EXPECT_TRUE(emulator::is_on_device(buffer->data(), bytes));
}

TEST_F(CudaPagedBufferTest, WhatIsRecordedNeedsNoRequestsOnlyZeros) {
  device().memory_bytes = 8 * page_bytes;  // not enough
  const Stream stream;
  for (const std::optional<std::int64_t> budget : {std::optional<std::int64_t>(), {7}}) {
    const auto buffer = make({PagingStrategy::managed, budget});
    streams().queued.clear();
    device().is_capturing = true;
    EXPECT_TRUE(buffer->make_resident(stream));
    buffer->join(stream);
    EXPECT_TRUE(is_all_zeros(*buffer));
    EXPECT_TRUE(streams().queued.empty());
    EXPECT_EQ(device().memory_info_count, 0);
    EXPECT_EQ(device().broken_captures, 0);
    device().is_capturing = false;
  }
  for (const Settings& settings :
       {Settings{PagingStrategy::managed, 5}, {PagingStrategy::pinned, {}}}) {
    const auto buffer = make(settings);
    device().is_capturing = true;
    EXPECT_FALSE(buffer->make_resident(stream));
    EXPECT_THROW(buffer->join(stream), Unsupported);
    device().is_capturing = false;
  }
}

TEST_F(CudaPagedBufferTest, DestroyingItWaitsForItsUseAsAWhole) {
  streams().turn = Turn::newest_stream;
  const Stream stream;
  auto buffer = make({PagingStrategy::managed, {}});
  ASSERT_TRUE(buffer->make_resident(stream));
  bool is_done = false;
  emulator::queue_kernel(stream, buffer->data(), bytes, [&] { is_done = true; });
  buffer->join(stream);
  buffer.reset();
  EXPECT_TRUE(is_done);
}

TEST_F(CudaPagedBufferTest, ARequestThatFindsNoMemoryIsRefusedAndPagesAreUsedWhereTheyAre) {
  for (const std::optional<std::int64_t> budget : {std::optional<std::int64_t>(), {3}, {7}}) {
    const Stream stream;
    const auto buffer = make_settled({PagingStrategy::managed, budget}, stream);
    buffer->prefetch_to_host({0, bytes}, stream);
    const PagedBufferReport before = buffer->report();
    EXPECT_EQ(before.refused_bytes, 0);
    streams().prefetch_error = cudaErrorMemoryAllocation;
    EXPECT_FALSE(buffer->make_resident(stream));
    const std::int64_t refused = budget == 3 ? 0 : bytes;
    EXPECT_EQ(buffer->report().refused_bytes, refused);
    walk(*buffer, stream, 0);
    const PagedBufferReport report = buffer->report();
    EXPECT_GE(report.refused_bytes, refused + bytes);
    EXPECT_EQ(report.host_bytes, bytes);
    EXPECT_EQ(report.moved_to_device_bytes, before.moved_to_device_bytes);
    streams().prefetch_error = cudaSuccess;
    walk(*buffer, stream, 1);
    EXPECT_GT(buffer->report().moved_to_device_bytes, report.moved_to_device_bytes);
    cudaStreamSynchronize(stream);
    EXPECT_EQ(
        0, std::memcmp(buffer->data(), expected_after(2).data(), static_cast<std::size_t>(bytes)));
  }
}

TEST_F(CudaPagedBufferTest, AnyOtherErrorOfARequestIsThrown) {
  const Stream stream;
  const auto buffer = make_settled({PagingStrategy::managed, {}}, stream);
  streams().prefetch_error = cudaErrorIllegalAddress;
  expect_error<CudaError>(
      "PagedBuffer: cudaMemPrefetchAsync: cudaErrorIllegalAddress: as the emulator was told",
      [&] { buffer->begin(0, stream); });
}

TEST_F(CudaPagedBufferTest, PinnedPagesUseNoMoreDeviceMemoryThanTheirSlots) {
  for (const std::int64_t slots : {2, 3}) {
    const Stream stream;
    const auto buffer = make({PagingStrategy::pinned, slots});
    std::set<const void*> places;
    for (std::int64_t page = 0; page < page_count; ++page) {
      places.insert(buffer->begin(page, stream));
      buffer->end(page, stream);
    }
    EXPECT_EQ(places.size(), static_cast<std::size_t>(slots));
    EXPECT_EQ(*places.rbegin(),
              static_cast<const std::byte*>(*places.begin()) + (slots - 1) * page_bytes);
  }
}

TEST_F(CudaPagedBufferTest, WithThreeSlotsAPageComesWhileAnotherGoes) {
  const Stream stream;
  const auto buffer = make({PagingStrategy::pinned, {}});
  walk(*buffer, stream, 0);
  std::set<cudaStream_t> coming, going;
  for (const Work& work : streams().queued) {
    if (work.kind == Kind::copy_to_device) coming.insert(work.stream);
    if (work.kind == Kind::copy_to_host) going.insert(work.stream);
  }
  ASSERT_EQ(coming.size(), 1u);
  ASSERT_EQ(going.size(), 1u);
  EXPECT_NE(*coming.begin(), *going.begin());
  EXPECT_FALSE(coming.contains(stream));
  EXPECT_FALSE(going.contains(stream));
}

TEST_F(CudaPagedBufferTest, APageThatCameAheadAndWasNotUsedGoesBackToKeepTheBudget) {
  const Stream stream;
  const auto buffer = make({PagingStrategy::managed, 2});
  buffer->begin(0, stream);  // page 1 comes with it
  buffer->end(0, stream);
  buffer->begin(3, stream);  // in the slot of page 1
  buffer->end(3, stream);
  buffer->join(stream);
  cudaStreamSynchronize(stream);
  EXPECT_LE(streams().peak_managed_on_device_bytes, static_cast<std::size_t>(2 * page_bytes));
  EXPECT_FALSE(emulator::is_on_device(buffer->data() + page_bytes, page_bytes));
}

TEST_F(CudaPagedBufferTest, NoBytesAreNoPages) {
  for (const PagingStrategy strategy : {PagingStrategy::managed, PagingStrategy::pinned}) {
    const Stream stream;
    const auto buffer =
        make_paged_buffer({DeviceType::cuda, 0}, {.bytes = 0, .strategy = strategy});
    EXPECT_EQ(buffer->page_count(), 0);
    EXPECT_EQ(buffer->data(), nullptr);
    buffer->prefetch_to_device({0, 0}, stream);
    buffer->prefetch_to_host({0, 0}, stream);
    walk(*buffer, stream, 0);
    EXPECT_THROW(buffer->begin(0, stream), InvalidArgument);
  }
}

TEST_F(CudaPagedBufferTest, ASmallBufferIsOneShortPage) {
  const Stream stream;
  for (const PagingStrategy strategy : {PagingStrategy::managed, PagingStrategy::pinned}) {
    const auto buffer = make_paged_buffer(
        {DeviceType::cuda, 0}, {.bytes = 100, .strategy = strategy, .resident_bytes = 100});
    EXPECT_EQ(buffer->page_count(), 1);
    walk(*buffer, stream, 0);
    cudaStreamSynchronize(stream);
  }
}

TEST_F(CudaPagedBufferTest, WrongCallsAreNamedAndChangeNothing) {
  const Stream stream;
  const auto buffer = make({PagingStrategy::pinned, 2});
  expect_invalid("PagedBuffer.begin: page is 7, want 0 to 6", [&] { buffer->begin(7, stream); });
  expect_invalid("PagedBuffer.begin: page is -1, want 0 to 6", [&] { buffer->begin(-1, stream); });
  expect_invalid("PagedBuffer.end: page 2 is not in use; begin it first",
                 [&] { buffer->end(2, stream); });
  buffer->begin(2, stream);
  expect_invalid("PagedBuffer.begin: page 2 is in use; end it first",
                 [&] { buffer->begin(2, stream); });
  expect_invalid(
      "PagedBuffer.begin: page 4 needs the room of page 2, which is in use; at most 2 pages, one "
      "after the other, are in use at once",
      [&] { buffer->begin(4, stream); });
  expect_invalid("PagedBuffer.prefetch_to_host: page 2 is in use; end it first",
                 [&] { buffer->prefetch_to_host({0, bytes}, stream); });
  expect_invalid(message("PagedBuffer.prefetch_to_device: the range is 2 bytes from ", bytes - 1,
                         " on, want a part of the ", bytes, " bytes"),
                 [&] { buffer->prefetch_to_device({bytes - 1, 2}, stream); });
  buffer->begin(3, stream);
  buffer->end(2, stream);
  buffer->end(3, stream);
}

TEST_F(CudaPagedBufferTest, AStreamOfAnotherDeviceOrThatRecordsAGraphIsRefused) {
  const auto buffer = make({PagingStrategy::managed, {}});
  device().current = 1;
  const Stream other;
  expect_invalid("PagedBuffer.begin: the stream belongs to cuda:1, but the memory is on cuda:0",
                 [&] { buffer->begin(0, other); });
  EXPECT_EQ(device().current, 1);
  device().current = 0;
  const Stream stream;
  device().is_capturing = true;
  expect_error<Unsupported>(
      "PagedBuffer.begin: the stream records a CUDA graph, but pages move from one launch to the "
      "next, which a graph would not repeat",
      [&] { buffer->begin(0, stream); });
}

TEST_F(CudaPagedBufferTest, MemoryThatRunsOutSaysWhoseItWas) {
  device().is_out_of_memory = true;
  expect_error<OutOfMemory>(
      message("PagedBuffer: ", bytes,
              " bytes of managed memory: cudaErrorMemoryAllocation: as the emulator was told"),
      [] { make({PagingStrategy::managed, {}}); });
  expect_error<OutOfMemory>(
      message("PagedBuffer: ", 3 * page_bytes,
              " bytes of device memory: cudaErrorMemoryAllocation: as the emulator was told"),
      [] { make({PagingStrategy::pinned, {}}); });
  device().is_out_of_memory = false;
  streams().calls_until_failure = 1;  // the second piece of memory
  expect_error<HostOutOfMemory>(message("PagedBuffer: ", bytes, " bytes of pinned host memory"),
                                [] { make({PagingStrategy::pinned, {}}); });
}

TEST_F(CudaPagedBufferTest, AForkedChildFreesNothingAndIsToldWhy) {
  const Stream stream;
  auto buffer = make({PagingStrategy::pinned, {}});
  const pid_t child = fork();
  if (child == 0) {
    const int live = streams().live, allocations = device().live_allocations;
    bool is_refused = false;
    try {
      buffer->begin(0, stream);
    } catch (const Unsupported&) {
      is_refused = true;
    }
    device().synchronize_count = 0;
    buffer.reset();
    const bool is_all_there = device().synchronize_count == 0 && streams().live == live &&
                              device().live_allocations == allocations;
    _exit(is_refused && is_all_there ? 0 : 1);
  }
  int status = -1;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
  walk(*buffer, stream, 0);
  cudaStreamSynchronize(stream);
}

}  // namespace
}  // namespace qlora
