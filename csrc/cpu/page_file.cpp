#include "cpu/page_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/statfs.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>

#include <linux/magic.h>

#include "format/nf4_layout.h"

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22  // the C library may be older than the kernel
#endif

namespace qlora {
namespace {

constexpr const char* name = "PagedBuffer";

[[noreturn]] void fail_to_make(const std::string& directory, int error) {
  throw FileError(
      message(name, ": page_file is '", directory, "', want a directory to make a file in"), error,
      directory);
}

[[noreturn]] void fail_to_reserve(const std::string& directory, std::int64_t bytes,
                                  const std::string& limit, int error) {
  throw FileError(message(name, ": no file of ", bytes, " bytes in '", directory, "'", limit),
                  error, directory);
}

/// Asks what is free first: a file system may need long to fill up, and others write there too.
void reserve(const OwnedFile& file, const std::string& directory, std::int64_t bytes) {
  rlimit limit{};
  // Asked for, as going beyond it ends the process where it does not ignore SIGXFSZ.
  if (getrlimit(RLIMIT_FSIZE, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY &&
      limit.rlim_cur < static_cast<rlim_t>(bytes)) {
    fail_to_reserve(directory, bytes,
                    message(", as RLIMIT_FSIZE is ", limit.rlim_cur, " in this process"), EFBIG);
  }
  struct statvfs system {};
  if (fstatvfs(file.get(), &system) == 0 && system.f_blocks > 0) {  // else it does not say
    const auto free_blocks = static_cast<std::int64_t>(system.f_bavail);
    const auto block_bytes = static_cast<std::int64_t>(system.f_frsize);
    if (ceil_divide(bytes, block_bytes) > free_blocks) {
      fail_to_reserve(directory, bytes, message(", where ", free_blocks * block_bytes, " are free"),
                      ENOSPC);
    }
  }
  int error = EINTR;
  while (error == EINTR) error = posix_fallocate(file.get(), 0, bytes);
  if (error != 0) fail_to_reserve(directory, bytes, "", error);
}

/// Whether the file system keeps its files in memory, and so has nothing to give back.
bool is_in_memory(const OwnedFile& file) {
  struct statfs system {};
  return fstatfs(file.get(), &system) == 0 &&
         (system.f_type == TMPFS_MAGIC || system.f_type == RAMFS_MAGIC);
}

std::int64_t host_page_bytes() {
  static const std::int64_t bytes = sysconf(_SC_PAGESIZE);
  return bytes;
}

std::int64_t round_down(std::int64_t value) {
  return value / host_page_bytes() * host_page_bytes();
}
std::int64_t round_up(std::int64_t value) { return round_down(value + host_page_bytes() - 1); }

}  // namespace

OwnedFile::~OwnedFile() {
  if (descriptor_ >= 0) close(descriptor_);
}

OwnedFile make_unnamed_file(const std::string& directory) {
  OwnedFile file(open(directory.c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC, S_IRUSR | S_IWUSR));
  if (file.get() >= 0) return file;
  // EISDIR is what a kernel says that does not know of such files.
  if (errno == EOPNOTSUPP || errno == EISDIR) return make_unlinked_file(directory);
  fail_to_make(directory, errno);
}

OwnedFile make_unlinked_file(const std::string& directory) {
  std::string path = directory + "/qlora_native_XXXXXX";
  OwnedFile file(mkostemp(path.data(), O_CLOEXEC));
  if (file.get() < 0 || unlink(path.c_str()) != 0) fail_to_make(directory, errno);
  return file;
}

PageFile::PageFile(const std::string& directory, std::int64_t bytes)
    : directory_(directory), bytes_(bytes), file_(make_unnamed_file(directory)) {
  if (bytes == 0) return;
  reserve(file_, directory, bytes);
  void* const memory = mmap(nullptr, static_cast<std::size_t>(bytes), PROT_READ | PROT_WRITE,
                            MAP_SHARED, file_.get(), 0);
  if (memory == MAP_FAILED) {
    const int error = errno;
    throw FileError(
        message(name, ": the file of ", bytes, " bytes in '", directory, "' cannot be mapped"),
        error, directory);
  }
  data_ = static_cast<std::byte*>(memory);
}

bool PageFile::gives_memory_back() const { return !is_in_memory(file_); }

PageFile::~PageFile() {
  if (data_ != nullptr) munmap(data_, static_cast<std::size_t>(bytes_));
}

void PageFile::ask(const ByteRange& range) const {
  // At one request the kernel reads no more than it reads ahead (128 KiB, if nobody set it), or the
  // device takes at once.
  constexpr std::int64_t piece_bytes = std::int64_t{128} << 10;
  const std::int64_t end = range.offset + range.bytes;
  for (std::int64_t begin = round_down(range.offset); begin < end; begin += piece_bytes) {
    const std::int64_t bytes = std::min(piece_bytes, end - begin);
    madvise(data_ + begin, static_cast<std::size_t>(bytes), MADV_WILLNEED);
  }
}

void PageFile::await(const ByteRange& range) const {
  // A request as well: kernels before 5.14 do not know it.
  const std::int64_t begin = round_down(range.offset), end = range.offset + range.bytes;
  madvise(data_ + begin, static_cast<std::size_t>(end - begin), MADV_POPULATE_READ);
}

void PageFile::start_writing(const ByteRange& range) const {
  if (sync_file_range(file_.get(), range.offset, range.bytes, SYNC_FILE_RANGE_WRITE) != 0) {
    fail_to_write(errno);
  }
}

void PageFile::drop(const ByteRange& range) const {
  // Written once more: it may have changed since start_writing. No metadata is written, which is for
  // files that are read after a crash.
  constexpr unsigned all =
      SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER;
  if (sync_file_range(file_.get(), range.offset, range.bytes, all) != 0) fail_to_write(errno);
  // A host page that a neighbour has a part in stays. The last has none behind it.
  const std::int64_t begin = round_up(range.offset);
  const std::int64_t end = range.offset + range.bytes == bytes_
                               ? round_up(bytes_)
                               : round_down(range.offset + range.bytes);
  if (begin >= end) return;
  // Both are requests, which nothing but the use of memory depends on. The kernel keeps what a
  // process has mapped, so the first goes first.
  madvise(data_ + begin, static_cast<std::size_t>(end - begin), MADV_DONTNEED);
  posix_fadvise(file_.get(), begin, end - begin, POSIX_FADV_DONTNEED);
}

void PageFile::check_written() const {
#ifdef SYNC_FILE_RANGE_WRITE
  // The kernel keeps an error for a file, whatever range it asks for.
  if (bytes_ > 0 && sync_file_range(file_.get(), 0, 1, SYNC_FILE_RANGE_WAIT_BEFORE) != 0) {
    fail_to_write(errno);
  }
#endif
}

void PageFile::fail_to_write(int error) const {
  throw FileError(message(name, ": the file in '", directory_,
                          "' could not be written, and pages of it may be lost"),
                  error, directory_);
}

}  // namespace qlora
