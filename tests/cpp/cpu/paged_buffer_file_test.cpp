// The CPU's PagedBuffer in a file: its bytes, what of it is in memory, forks.
// (cpu/page_file_test.cpp has its errors.)
#include <fcntl.h>
#include <sys/mman.h>

#include <chrono>
#include <cstring>
#include <fstream>
#include <memory>
#include <thread>

#include "core/paged_buffer.h"
#include "support/expect_error.h"
#include "support/in_child.h"
#include "support/scratch_directory.h"

namespace qlora {
namespace {

constexpr std::int64_t page_bytes = std::int64_t{1} << 20;
constexpr Device cpu{DeviceType::cpu, 0};
void* const no_stream = nullptr;

class PagedBufferFile : public testing::Test {
 protected:
  std::unique_ptr<PagedBuffer> make(std::int64_t bytes,
                                    std::optional<std::int64_t> resident_bytes = std::nullopt,
                                    std::int64_t bytes_per_page = page_bytes,
                                    PagingStrategy strategy = PagingStrategy::automatic) const {
    return make_paged_buffer(cpu, {.bytes = bytes,
                                   .page_bytes = bytes_per_page,
                                   .strategy = strategy,
                                   .resident_bytes = resident_bytes,
                                   .page_file = directory.path()});
  }

  ScratchDirectory directory;
};

/// How much of a buffer is in memory, mapped or as the kernel's copy of the file.
std::int64_t bytes_in_memory(const PagedBuffer& buffer) {
  const std::int64_t unit = sysconf(_SC_PAGESIZE);
  std::vector<unsigned char> pages(static_cast<std::size_t>((buffer.bytes() + unit - 1) / unit));
  EXPECT_EQ(mincore(buffer.data(), static_cast<std::size_t>(buffer.bytes()), pages.data()), 0);
  return unit * std::count_if(pages.begin(), pages.end(), [](auto page) { return page & 1; });
}

/// Waits for what was asked for to come, as nothing touches it; for ten seconds at most.
bool comes_to(std::int64_t bytes, const PagedBuffer& buffer) {
  for (int i = 0; i < 1000 && bytes_in_memory(buffer) < bytes; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  return bytes_in_memory(buffer) == bytes;
}

/// Of this process: what it has mapped and memory holds.
std::int64_t resident_set_bytes() {
  std::ifstream file("/proc/self/statm");
  std::int64_t all = 0, resident = 0;
  file >> all >> resident;
  return resident * sysconf(_SC_PAGESIZE);
}

std::byte value_of(std::int64_t i, int step) {
  return static_cast<std::byte>((i >> 12) * 7 + i + step);
}

/// Writes all bytes anew, page by page, having read what step `step - 1` wrote.
void step_pages(PagedBuffer& buffer, int step, const std::function<void()>& look = [] {}) {
  for (std::int64_t page = 0; page < buffer.page_count(); ++page) {
    std::byte* const memory = buffer.begin(page, no_stream);
    const ByteRange range = buffer.page_range(page);
    std::int64_t wrong = 0;
    for (std::int64_t i = 0; i < range.bytes; ++i) {
      const std::byte before = step == 1 ? std::byte{0} : value_of(range.offset + i, step - 1);
      wrong += memory[i] != before;
      memory[i] = value_of(range.offset + i, step);
    }
    EXPECT_EQ(wrong, 0) << "page " << page << ", step " << step;
    look();
    buffer.end(page, no_stream);
  }
  buffer.join(no_stream);
}

TEST_F(PagedBufferFile, IsTheStrategyWhereThereIsAPageFile) {
  EXPECT_EQ(make(100)->strategy(), PagingStrategy::file);
  const auto buffer = make(3 * page_bytes + 5, 2 * page_bytes, page_bytes, PagingStrategy::file);
  EXPECT_EQ(buffer->strategy(), PagingStrategy::file);
  EXPECT_EQ(buffer->device(), cpu);
  EXPECT_EQ(buffer->page_count(), 4);
  EXPECT_TRUE(buffer->is_addressable_by_device());
  EXPECT_FALSE(buffer->make_resident(no_stream));
  EXPECT_FALSE(make(100)->make_resident(no_stream));
}

TEST_F(PagedBufferFile, NoBytesAreNoPages) {
  const auto buffer = make(0);
  EXPECT_EQ(buffer->data(), nullptr);
  EXPECT_EQ(buffer->page_count(), 0);
  buffer->prefetch_to_host({0, 0}, no_stream);
  buffer->join(no_stream);
}

TEST_F(PagedBufferFile, HasNoNameAndIsGoneWithTheBuffer) {
  const auto before = open_files();
  {
    const auto buffer = make(3 * page_bytes);
    EXPECT_TRUE(directory.is_empty());
    EXPECT_EQ(open_files().size(), before.size() + 1);
    step_pages(*buffer, 1);
  }
  EXPECT_EQ(open_files(), before);
  EXPECT_TRUE(directory.is_empty());
}

TEST_F(PagedBufferFile, BytesSurviveThatTheirPagesGoAway) {
  // Budgets of all, of none, of two and of three guests, and of pages that stay; a page that is no
  // multiple of larger hosts' pages, and a short last one.
  for (const std::int64_t bytes_per_page : {page_bytes, std::int64_t{12} << 10}) {
    const std::int64_t bytes = 7 * bytes_per_page + 1000;
    for (const std::int64_t room : {0, 2, 3, 5, 8}) {
      const auto budget = room == 0 ? std::nullopt : std::optional(room * bytes_per_page);
      const auto buffer = make(bytes, budget, bytes_per_page);
      for (int step = 1; step <= 3; ++step) step_pages(*buffer, step);
      for (const std::int64_t page : {7, 3, 4, 0, 3}) {
        const ByteRange range = buffer->page_range(page);
        std::byte* const memory = buffer->begin(page, no_stream);
        EXPECT_EQ(memory, buffer->data() + range.offset);
        EXPECT_EQ(memory[range.bytes - 1], value_of(range.offset + range.bytes - 1, 3));
        buffer->end(page, no_stream);
      }
      buffer->join(no_stream);
    }
  }
}

TEST_F(PagedBufferFile, ABudgetIsKeptInMemoryAndByTheAccount) {
  if (directory.is_memory()) GTEST_SKIP() << directory.path() << " is on a tmpfs: nothing goes";
  constexpr std::int64_t bytes = 32 * page_bytes;
  for (const std::int64_t room : {2, 3, 8}) {
    const auto buffer = make(bytes, room * page_bytes);
    const std::int64_t before = resident_set_bytes();
    for (int step = 1; step <= 2; ++step) {
      std::int64_t most = 0, most_by_account = 0;
      step_pages(*buffer, step, [&] {
        most = std::max(most, bytes_in_memory(*buffer));
        most_by_account = std::max(most_by_account, buffer->report().device_bytes);
      });
      EXPECT_LE(most, room * page_bytes) << room << " pages, step " << step;
      EXPECT_LE(most_by_account, room * page_bytes);
      EXPECT_GE(most_by_account, (room - 1) * page_bytes);  // one is on its way to the file
    }
    const std::int64_t staying = std::max<std::int64_t>(room - 3, 0) * page_bytes;
    EXPECT_EQ(buffer->report().device_bytes, staying);
    EXPECT_LE(bytes_in_memory(*buffer), staying);
    EXPECT_LE(resident_set_bytes() - before, staying + page_bytes);  // and what the test took
  }
}

TEST_F(PagedBufferFile, WithoutABudgetNothingIsGivenBack) {
  const auto buffer = make(8 * page_bytes);
  step_pages(*buffer, 1);
  EXPECT_EQ(buffer->report().device_bytes, 8 * page_bytes);
  EXPECT_EQ(buffer->report().moved_to_host_bytes, 0);
  EXPECT_EQ(bytes_in_memory(*buffer), 8 * page_bytes);
}

TEST_F(PagedBufferFile, BeginAsksForThePageAndTheNextOne) {
  if (directory.is_memory()) GTEST_SKIP() << directory.path() << " is on a tmpfs: nothing goes";
  constexpr std::int64_t bytes = 8 * page_bytes;
  const auto buffer = make(bytes, 3 * page_bytes);
  step_pages(*buffer, 1);
  ASSERT_EQ(bytes_in_memory(*buffer), 0);
  buffer->begin(2, no_stream);
  EXPECT_EQ(buffer->report().device_bytes, 2 * page_bytes);
  EXPECT_TRUE(comes_to(2 * page_bytes, *buffer));
  buffer->begin(3, no_stream);
  EXPECT_EQ(buffer->report().device_bytes, 3 * page_bytes);
  buffer->begin(4, no_stream);
  EXPECT_EQ(buffer->report().device_bytes, 3 * page_bytes);  // no room for page 5
  EXPECT_TRUE(comes_to(3 * page_bytes, *buffer));
  expect_invalid(
      "PagedBuffer.begin: page 5 has no room, as 3 pages are in use beside those that stay; end one "
      "first",
      [&] { buffer->begin(5, no_stream); });
  for (const std::int64_t page : {2, 3, 4}) buffer->end(page, no_stream);
  buffer->begin(7, no_stream);  // the last has no next
  buffer->end(7, no_stream);
  buffer->join(no_stream);
  EXPECT_EQ(buffer->report().host_bytes, bytes);
  EXPECT_EQ(bytes_in_memory(*buffer), 0);
}

TEST_F(PagedBufferFile, BeginAsksForAllOfALargePage) {
  if (directory.is_memory()) GTEST_SKIP() << directory.path() << " is on a tmpfs: nothing goes";
  constexpr std::int64_t bytes =
      PagedBufferOptions{}.page_bytes;  // more than the kernel reads ahead
  const auto buffer = make(bytes, std::nullopt, bytes);
  std::memset(buffer->data(), 1, bytes);
  buffer->prefetch_to_host({0, bytes}, no_stream);
  buffer->join(no_stream);
  ASSERT_EQ(bytes_in_memory(*buffer), 0);
  buffer->begin(0, no_stream);
  EXPECT_TRUE(comes_to(bytes, *buffer));
}

TEST_F(PagedBufferFile, APageThatWasAskedForInVainMakesRoom) {
  const auto buffer = make(8 * page_bytes, 2 * page_bytes);
  step_pages(*buffer, 1);
  buffer->prefetch_to_device({0, 8 * page_bytes}, no_stream);
  EXPECT_EQ(buffer->report().device_bytes, 2 * page_bytes);  // 0 and 1
  EXPECT_EQ(buffer->begin(5, no_stream)[3], value_of(5 * page_bytes + 3, 1));
  EXPECT_EQ(buffer->begin(6, no_stream)[3], value_of(6 * page_bytes + 3, 1));
  EXPECT_EQ(buffer->report().device_bytes, 2 * page_bytes);
}

TEST_F(PagedBufferFile, APageIsTakenBackWhileItGoes) {
  const auto buffer = make(8 * page_bytes, 3 * page_bytes);
  step_pages(*buffer, 1);
  for (int i = 0; i < 5; ++i) {
    std::byte* const memory = buffer->begin(6, no_stream);
    memory[7] = static_cast<std::byte>(i);
    buffer->end(6, no_stream);
  }
  buffer->join(no_stream);
  EXPECT_EQ(buffer->report().device_bytes, page_bytes);  // 7, which was asked for as the next
  EXPECT_EQ(buffer->data()[6 * page_bytes + 7], std::byte{4});
}

TEST_F(PagedBufferFile, PrefetchesMoveWholePages) {
  const auto buffer = make(8 * page_bytes);
  std::memset(buffer->data(), 9, 8 * page_bytes);  // beside the account
  buffer->prefetch_to_device({page_bytes - 1, 2}, no_stream);
  EXPECT_EQ(buffer->report().device_bytes, 2 * page_bytes);
  EXPECT_EQ(buffer->report().moved_to_device_bytes, 2 * page_bytes);
  buffer->prefetch_to_host({0, 8 * page_bytes}, no_stream);
  buffer->join(no_stream);
  EXPECT_EQ(buffer->report().host_bytes, 8 * page_bytes);
  EXPECT_EQ(buffer->report().moved_to_host_bytes, 2 * page_bytes);
  if (!directory.is_memory()) {
    EXPECT_EQ(bytes_in_memory(*buffer), 0);
  }
  EXPECT_EQ(buffer->data()[5 * page_bytes], std::byte{9});
  buffer->begin(0, no_stream);
  expect_invalid("PagedBuffer.prefetch_to_host: page 0 is in use; end it first",
                 [&] { buffer->prefetch_to_host({0, 1}, no_stream); });
}

/// What is written out fails from here on, as to a disk that has died.
void break_file_in(const ScratchDirectory& directory) {
  for (const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) {
    std::error_code gone;
    const std::string file = std::filesystem::read_symlink(entry.path(), gone).string();
    if (file.find(directory.path()) != 0) continue;
    const int null = open("/dev/null", O_RDWR | O_CLOEXEC);
    ASSERT_GE(dup2(null, std::stoi(entry.path().filename())), 0);
    close(null);
    return;
  }
  FAIL() << "no file is open in " << directory.path();
}

TEST_F(PagedBufferFile, AnErrorOfWritingOutIsJoins) {
  for (const std::int64_t room : {0, 2, 3, 4}) {
    const auto budget = room == 0 ? std::nullopt : std::optional(room * page_bytes);
    const auto buffer = make(6 * page_bytes, budget);
    step_pages(*buffer, 1);
    break_file_in(directory);
    const std::string text = "PagedBuffer: the file in '" + directory.path() +
                             "' could not be written, and pages of it may be lost: Illegal seek";
    // All pages are done first, and nothing is dropped; each join says so from then on.
    expect_error<FileError>(text, [&] { step_pages(*buffer, 2); });
    EXPECT_EQ(buffer->data()[5 * page_bytes + 1], value_of(5 * page_bytes + 1, 2));
    expect_error<FileError>(text, [&] { buffer->join(no_stream); });
  }
}

TEST_F(PagedBufferFile, AForkedChildMayDestroyItAndNoMore) {
  auto buffer = make(6 * page_bytes, 3 * page_bytes);
  step_pages(*buffer, 1);
  const auto child_refuses = [&](const char* operation, const std::function<void()>& call) {
    expect_error<Unsupported>(std::string("PagedBuffer.") + operation +
                                  ": this process was forked from the one that made the buffer, "
                                  "whose file it would write to",
                              call);
  };
  in_child([&] {
    child_refuses("begin", [&] { buffer->begin(0, no_stream); });
    child_refuses("make_resident", [&] { buffer->make_resident(no_stream); });
    child_refuses("join", [&] { buffer->join(no_stream); });
    child_refuses("prefetch_to_device", [&] { buffer->prefetch_to_device({0, 1}, no_stream); });
    child_refuses("prefetch_to_host", [&] { buffer->prefetch_to_host({0, 1}, no_stream); });
  });
  std::byte* const memory = buffer->begin(4, no_stream);
  in_child([&] {
    child_refuses("end", [&] { buffer->end(4, no_stream); });
    const auto before = open_files();
    buffer.reset();
    EXPECT_EQ(open_files().size(), before.size() - 1);
    auto of_its_own = make(6 * page_bytes, 3 * page_bytes);
    step_pages(*of_its_own, 1);
  });
  EXPECT_EQ(memory[5], value_of(4 * page_bytes + 5, 1));
  buffer->end(4, no_stream);
  step_pages(*buffer, 2);
}

}  // namespace
}  // namespace qlora
