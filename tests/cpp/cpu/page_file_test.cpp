// What a page_file can have against it: each is an error that names it, and leaves nothing behind.
#include "cpu/page_file.h"

#include <fcntl.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/statvfs.h>

#include <csignal>
#include <fstream>

#include "support/expect_error.h"
#include "support/in_child.h"
#include "support/scratch_directory.h"

namespace qlora {
namespace {

constexpr Device cpu{DeviceType::cpu, 0};

class PageFileErrors : public testing::Test {
 protected:
  /// The error, with its number and path; and nothing stays open or in the directory.
  void expect_file_error(int number, const std::string& path, const std::string& text,
                         std::int64_t bytes) {
    const auto before = open_files();
    try {
      make_paged_buffer(cpu, {.bytes = bytes, .page_file = path});
      ADD_FAILURE() << "no error, want: " << text;
    } catch (const FileError& error) {
      EXPECT_EQ(text, error.what());
      EXPECT_EQ(error.number, number);
      EXPECT_EQ(error.path, path);
    }
    EXPECT_EQ(open_files(), before);
    EXPECT_TRUE(directory.is_empty());
  }

  std::string refusal(const std::string& path, const std::string& reason) const {
    return "PagedBuffer: page_file is '" + path +
           "', want a directory to make a file in: " + reason;
  }

  ScratchDirectory directory;
};

TEST_F(PageFileErrors, ADirectoryThatIsNotThere) {
  const std::string path = directory.path() + "/none";
  for (const std::int64_t bytes : {0, 1000}) {
    expect_file_error(ENOENT, path, refusal(path, "No such file or directory"), bytes);
  }
  expect_file_error(ENOENT, "", refusal("", "No such file or directory"), 1);
}

TEST_F(PageFileErrors, AFileIsNoDirectory) {
  const std::string path = "/proc/self/status";
  expect_file_error(ENOTDIR, path, refusal(path, "Not a directory"), 1000);
}

TEST_F(PageFileErrors, ADirectoryThatCannotBeWritten) {
  ASSERT_EQ(chmod(directory.path().c_str(), 0555), 0);
  in_child([&] {
    // Who may do anything has to be somebody else to be refused.
    if (geteuid() == 0) {
      ASSERT_EQ(seteuid(65534), 0);
    }
    expect_error<FileError>(refusal(directory.path(), "Permission denied"), [&] {
      make_paged_buffer(cpu, {.bytes = 1000, .page_file = directory.path()});
    });
  });
  EXPECT_TRUE(directory.is_empty());
}

TEST_F(PageFileErrors, FarTooMuchDoesNotFillTheDiskFirst) {
  const auto free_blocks = [&] {
    struct statvfs system {};
    EXPECT_EQ(statvfs(directory.path().c_str(), &system), 0);
    return std::pair(system.f_bavail, system.f_frsize);
  };
  constexpr std::int64_t bytes = std::int64_t{1} << 55;
  const auto before = open_files();
  const auto [blocks, block_bytes] = free_blocks();
  try {
    make_paged_buffer(cpu, {.bytes = bytes, .page_file = directory.path()});
    ADD_FAILURE() << "no error";
  } catch (const FileError& error) {
    const std::string text = error.what();
    EXPECT_EQ(error.number, ENOSPC);
    EXPECT_EQ(text.find("PagedBuffer: no file of " + std::to_string(bytes) + " bytes in '" +
                        directory.path() + "', where "),
              0u)
        << text;
    EXPECT_NE(text.find(" are free: No space left on device"), std::string::npos) << text;
  }
  EXPECT_EQ(open_files(), before);
  // Others write here, too, but not half of what is free.
  EXPECT_GE(free_blocks().first, blocks / 2) << block_bytes;
}

TEST_F(PageFileErrors, MoreThanAProcessMayWrite) {
  for (void (*disposition)(int) : {SIG_DFL, SIG_IGN}) {
    in_child([&] {
      std::signal(SIGXFSZ, disposition);
      const rlimit limit{1 << 20, 1 << 20};
      ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &limit), 0);
      expect_file_error(EFBIG, directory.path(),
                        "PagedBuffer: no file of 1048577 bytes in '" + directory.path() +
                            "', as RLIMIT_FSIZE is 1048576 in this process: File too large",
                        (1 << 20) + 1);
      make_paged_buffer(cpu, {.bytes = 1 << 20, .page_file = directory.path()});
    });
  }
}

TEST_F(PageFileErrors, AMappingThatFails) {
#ifdef __SANITIZE_ADDRESS__
  GTEST_SKIP() << "AddressSanitizer needs more addresses than the limit of this test";
#endif
  in_child([&] {
    constexpr std::int64_t bytes = std::int64_t{256} << 20;
    const rlimit limit{bytes, bytes};
    ASSERT_EQ(setrlimit(RLIMIT_AS, &limit), 0);
    expect_file_error(ENOMEM, directory.path(),
                      "PagedBuffer: the file of 268435456 bytes in '" + directory.path() +
                          "' cannot be mapped: Cannot allocate memory",
                      bytes);
  });
}

TEST_F(PageFileErrors, ADiskThatIsFull) {
  const std::string disk = directory.path() + "/disk";
  ASSERT_EQ(mkdir(disk.c_str(), 0700), 0);
  if (mount("tmpfs", disk.c_str(), "tmpfs", 0, "size=1m") != 0) {
    GTEST_SKIP() << "this process may not mount a small disk";
  }
  const auto before = open_files();
  const std::string start = "PagedBuffer: no file of ", end = ": No space left on device";
  const auto expect_full = [&](std::int64_t bytes, const std::string& free) {
    expect_error<FileError>(start + std::to_string(bytes) + " bytes in '" + disk + "'" + free + end,
                            [&] { make_paged_buffer(cpu, {.bytes = bytes, .page_file = disk}); });
  };
  expect_full((1 << 20) + 1, ", where 1048576 are free");
  {
    const auto half = make_paged_buffer(cpu, {.bytes = 1 << 19, .page_file = disk});
    expect_full((1 << 19) + 1, ", where 524288 are free");  // what is reserved is not free
  }
  EXPECT_EQ(open_files(), before);
  make_paged_buffer(cpu, {.bytes = 1 << 20, .page_file = disk});
  EXPECT_TRUE(std::filesystem::is_empty(disk));
  EXPECT_EQ(umount(disk.c_str()), 0);  // it would be busy if a file were open
}

TEST_F(PageFileErrors, WhereAFileNeedsANameItIsGoneAtOnce) {
  {
    const OwnedFile file = make_unlinked_file(directory.path());
    EXPECT_TRUE(directory.is_empty());
    EXPECT_EQ(write(file.get(), "1234", 4), 4);
    EXPECT_EQ(fcntl(file.get(), F_GETFD) & FD_CLOEXEC, FD_CLOEXEC);
  }
  const std::string path = directory.path() + "/none";
  expect_error<FileError>(refusal(path, "No such file or directory"),
                          [&] { make_unlinked_file(path); });
}

TEST(PageFileOptions, ThatDoNotGoTogetherAreNamed) {
  const auto expect = [](const std::string& text, Device device,
                         const PagedBufferOptions& options) {
    expect_invalid(text, [&] { make_paged_buffer(device, options); });
  };
  expect("PagedBuffer: strategy is file, but there is no page_file, the directory of the file", cpu,
         {.bytes = 1, .strategy = PagingStrategy::file});
  expect("PagedBuffer: page_file is for strategy file, but strategy is ordinary", cpu,
         {.bytes = 1, .strategy = PagingStrategy::ordinary, .page_file = "."});
  expect("PagedBuffer: strategy is pinned, on the CPU want automatic, ordinary or file", cpu,
         {.bytes = 1, .strategy = PagingStrategy::pinned, .page_file = "."});
  expect("PagedBuffer: page_file is for the CPU, but device is cuda:0", {DeviceType::cuda, 0},
         {.bytes = 1, .page_file = "."});
  expect("PagedBuffer: page_file holds a null character, want the path of a directory", cpu,
         {.bytes = 1, .page_file = std::string(".\0x", 3)});
}

}  // namespace
}  // namespace qlora
