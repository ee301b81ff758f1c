// A directory of a test's own, where the tests run: on a disk, as a build is.
#pragma once

#include <sys/vfs.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <string>
#include <system_error>
#include <vector>

#include <gtest/gtest.h>

class ScratchDirectory {
 public:
  ScratchDirectory() : path_((std::filesystem::current_path() / "scratch_XXXXXX").string()) {
    if (mkdtemp(path_.data()) == nullptr) ADD_FAILURE() << "cannot make " << path_;
  }
  ~ScratchDirectory() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  ScratchDirectory(const ScratchDirectory&) = delete;
  ScratchDirectory& operator=(const ScratchDirectory&) = delete;

  const std::string& path() const { return path_; }
  bool is_empty() const { return std::filesystem::is_empty(path_); }

  /// Whether its files are memory, and are written out nowhere.
  bool is_memory() const {
    constexpr long tmpfs_magic = 0x01021994;
    struct statfs system {};
    return statfs(path_.c_str(), &system) == 0 && system.f_type == tmpfs_magic;
  }

 private:
  std::string path_;
};

/// What this process has open, by what it leads to.
inline std::vector<std::string> open_files() {
  std::vector<std::string> files;
  for (const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) {
    std::error_code gone;  // as the descriptor that lists them
    const auto file = std::filesystem::read_symlink(entry.path(), gone);
    if (!gone && file.string().find("/proc/") != 0) files.push_back(file.string());
  }
  std::sort(files.begin(), files.end());
  return files;
}
