// PagedBuffer: its pages, checks and account, on the CPU's ordinary memory and on a fake that moves.
#include "core/paged_buffer.h"

#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <fstream>
#include <utility>

#include "core/backend.h"
#include "support/expect_error.h"

namespace qlora {
namespace {

constexpr std::int64_t page_bytes = PagedBufferOptions::page_unit;
constexpr Device cpu{DeviceType::cpu, 0};

std::unique_ptr<PagedBuffer> make(std::int64_t bytes) {
  return make_paged_buffer(cpu, {.bytes = bytes, .page_bytes = page_bytes});
}

TEST(PagedBuffer, IsCutIntoPagesTheLastOfThemShort) {
  const auto buffer = make(2 * page_bytes + 100);
  EXPECT_EQ(buffer->device(), cpu);
  EXPECT_EQ(buffer->strategy(), PagingStrategy::ordinary);
  EXPECT_EQ(buffer->bytes(), 2 * page_bytes + 100);
  EXPECT_EQ(buffer->page_bytes(), page_bytes);
  ASSERT_EQ(buffer->page_count(), 3);
  EXPECT_EQ(buffer->page_range(1).offset, page_bytes);
  EXPECT_EQ(buffer->page_range(1).bytes, page_bytes);
  EXPECT_EQ(buffer->page_range(2).offset, 2 * page_bytes);
  EXPECT_EQ(buffer->page_range(2).bytes, 100);
  EXPECT_EQ(make(2 * page_bytes)->page_count(), 2);
  EXPECT_EQ(make(1)->page_count(), 1);
}

TEST(PagedBuffer, OnTheCpuAPageIsAPartOfTheMemory) {
  const auto buffer = make(3 * page_bytes);
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(buffer->data()) % page_bytes, 0u);
  for (std::int64_t page = 0; page < 3; ++page) {
    std::byte* const memory = buffer->begin(page, nullptr);
    EXPECT_EQ(memory, buffer->data() + page * page_bytes);
    std::memset(memory, static_cast<int>(page + 1), page_bytes);
    buffer->end(page, nullptr);
  }
  buffer->join(nullptr);
  EXPECT_EQ(buffer->data()[3 * page_bytes - 1], std::byte{3});
}

TEST(PagedBuffer, OnTheCpuFreshMemoryIsZeroAndAligned) {
  // Of sizes that the allocator keeps when they are freed, and of some that it gives back.
  for (const std::int64_t bytes : {std::int64_t{1}, std::int64_t{100}, page_bytes, 5 * page_bytes,
                                   std::int64_t{1} << 20, std::int64_t{40} << 20}) {
    for (int i = 0; i < 3; ++i) {
      const auto buffer = make(bytes);
      EXPECT_EQ(reinterpret_cast<std::uintptr_t>(buffer->data()) % page_bytes, 0u);
      std::byte* const end = buffer->data() + bytes;
      EXPECT_EQ(std::find_if(buffer->data(), end, [](std::byte b) { return b != std::byte{0}; }),
                end);
      std::memset(buffer->data(), 0xff, static_cast<std::size_t>(bytes));  // for the next
    }
  }
}

TEST(PagedBuffer, OnTheCpuMemoryIsTakenWhenItIsWritten) {
#ifdef __SANITIZE_ADDRESS__
  GTEST_SKIP() << "AddressSanitizer's notes on it are memory, too";
#endif
  const auto resident_bytes = [] {
    std::ifstream file("/proc/self/statm");
    std::int64_t all = 0, resident = 0;
    file >> all >> resident;
    return resident * sysconf(_SC_PAGESIZE);
  };
  constexpr std::int64_t bytes = std::int64_t{1} << 30;
  const std::int64_t before = resident_bytes();
  const auto buffer = make(bytes);
  EXPECT_LT(resident_bytes() - before, bytes / 16);  // the account of its pages
  std::memset(buffer->data() + bytes / 2, 1, bytes / 8);
  EXPECT_GE(resident_bytes() - before, bytes / 8);
  EXPECT_LT(resident_bytes() - before, bytes / 4);
}

TEST(PagedBuffer, OnTheCpuAllOfItIsOnTheHostAndNothingMoves) {
  const auto buffer = make(3 * page_bytes);
  buffer->prefetch_to_device({0, 3 * page_bytes}, nullptr);
  buffer->prefetch_to_host({0, 3 * page_bytes}, nullptr);
  const PagedBufferReport report = buffer->report();
  EXPECT_EQ(report.host_bytes, 3 * page_bytes);
  EXPECT_EQ(report.unknown_bytes + report.device_bytes, 0);
  EXPECT_EQ(report.moved_to_device_bytes + report.moved_to_host_bytes, 0);
}

TEST(PagedBuffer, NoBytesAreNoPages) {
  const auto buffer = make(0);
  EXPECT_EQ(buffer->page_count(), 0);
  EXPECT_EQ(buffer->data(), nullptr);
  buffer->join(nullptr);
  expect_invalid("PagedBuffer.begin: page is 0, want 0 to -1", [&] { buffer->begin(0, nullptr); });
}

TEST(PagedBuffer, OptionsThatCannotBeRightAreNamed) {
  const auto expect = [](const std::string& text, const PagedBufferOptions& options) {
    expect_invalid(text, [&] { make_paged_buffer(cpu, options); });
  };
  expect("PagedBuffer: bytes is -1, want 0 to 1152921504606846976", {.bytes = -1});
  expect("PagedBuffer: bytes is 9223372036854775807, want 0 to 1152921504606846976",
         {.bytes = std::int64_t{0x7fffffffffffffff}});
  for (const std::int64_t wrong : {std::int64_t{0}, std::int64_t{4097}, -page_bytes}) {
    expect(message("PagedBuffer: page_bytes is ", wrong, ", want a positive multiple of 4096"),
           {.bytes = 1, .page_bytes = wrong});
  }
  expect(
      "PagedBuffer: resident_bytes is 8191, want at least two pages of 4096 bytes: the one "
      "in use and the one that comes",
      {.bytes = 1 << 20, .page_bytes = page_bytes, .resident_bytes = 8191});
  expect(
      "PagedBuffer: resident_bytes is for a device beside the host, or for a file; on the CPU give "
      "page_file too, or leave it out",
      {.bytes = 1 << 20, .page_bytes = page_bytes, .resident_bytes = 1 << 20});
  expect("PagedBuffer: strategy is managed, on the CPU want automatic, ordinary or file",
         {.bytes = 1, .strategy = PagingStrategy::managed});
}

TEST(PagedBuffer, HostMemoryThatRunsOutIsAnError) {
#ifdef __SANITIZE_ADDRESS__
  GTEST_SKIP() << "AddressSanitizer ends the process instead";
#endif
  expect_error<HostOutOfMemory>("PagedBuffer: no 1152921504606846976 bytes of host memory",
                                [] { make(std::int64_t{1} << 60); });
}

/// Remembers what it is asked, and notes it in the account.
class FakePages final : public PagedBuffer {
 public:
  explicit FakePages(std::int64_t bytes)
      : PagedBuffer({DeviceType::cuda, 0}, PagingStrategy::managed,
                    PagedBufferOptions{.bytes = bytes, .page_bytes = PagedBufferOptions::page_unit},
                    PagePlace::unknown) {}
  std::byte* data() const override { return nullptr; }

  std::vector<std::pair<std::int64_t, std::int64_t>> asked;

 private:
  std::byte* do_begin(std::int64_t page, void*) override {
    note(page, PagePlace::device);
    return nullptr;
  }
  void do_end(std::int64_t page, void*) override { note(page, PagePlace::host); }
  void do_join(void*) override {}
  bool do_make_resident(void*, std::int64_t) override { return true; }
  void do_prefetch_to_device(std::int64_t first, std::int64_t last, void*) override {
    asked.emplace_back(first, last);
  }
  void do_prefetch_to_host(std::int64_t first, std::int64_t last, void*) override {
    asked.emplace_back(first, last);
  }
};

TEST(PagedBuffer, TheAccountIsOfWhatWasAskedLast) {
  FakePages pages(page_bytes + 10);
  EXPECT_EQ(pages.report().unknown_bytes, page_bytes + 10);
  pages.begin(1, nullptr);
  EXPECT_EQ(pages.report().unknown_bytes, page_bytes);
  EXPECT_EQ(pages.report().device_bytes, 10);
  pages.end(1, nullptr);
  pages.begin(1, nullptr);
  pages.end(1, nullptr);
  EXPECT_EQ(pages.report().device_bytes, 0);
  EXPECT_EQ(pages.report().host_bytes, 10);
  EXPECT_EQ(pages.report().moved_to_device_bytes, 20);
  EXPECT_EQ(pages.report().moved_to_host_bytes, 20);
}

TEST(PagedBuffer, ARangeMeansThePagesThatItTouches) {
  FakePages pages(4 * page_bytes);
  pages.prefetch_to_device({0, 0}, nullptr);
  EXPECT_TRUE(pages.asked.empty());
  pages.prefetch_to_device({page_bytes - 1, 2}, nullptr);
  pages.prefetch_to_host({page_bytes, page_bytes}, nullptr);
  pages.prefetch_to_host({3 * page_bytes, page_bytes}, nullptr);
  EXPECT_EQ(pages.asked,
            (std::vector<std::pair<std::int64_t, std::int64_t>>{{0, 2}, {1, 2}, {3, 4}}));
  expect_invalid(
      "PagedBuffer.prefetch_to_host: the range is 1 bytes from 16384 on, want a part "
      "of the 16384 bytes",
      [&] { pages.prefetch_to_host({4 * page_bytes, 1}, nullptr); });
  expect_invalid(
      "PagedBuffer.prefetch_to_device: the range is 1 bytes from -1 on, want a part of "
      "the 16384 bytes",
      [&] { pages.prefetch_to_device({-1, 1}, nullptr); });
}

}  // namespace
}  // namespace qlora
