// A file without a name that is mapped as a whole: memory that need not fit in memory.
//
// A page of it is read when it is touched, and what was written stays in memory until the kernel has
// written it out. The functions here say when: ask, then use, then start_writing,
// await and drop.
#pragma once

#include <string>

#include "core/paged_buffer.h"

namespace qlora {

/// Closes a file descriptor.
class OwnedFile {
 public:
  explicit OwnedFile(int descriptor) : descriptor_(descriptor) {}
  OwnedFile(OwnedFile&& other) noexcept : descriptor_(other.descriptor_) { other.descriptor_ = -1; }
  OwnedFile(const OwnedFile&) = delete;
  OwnedFile& operator=(const OwnedFile&) = delete;
  ~OwnedFile();

  int get() const { return descriptor_; }

 private:
  int descriptor_;
};

// An empty file in a directory, without a name, so that it is gone however the process ends. Not all
// file systems make one at once (O_TMPFILE); where they do not, it has a name for a moment. Both
// throw FileError.
OwnedFile make_unnamed_file(const std::string& directory);
OwnedFile make_unlinked_file(const std::string& directory);

/// Ranges are of bytes of the file.
class PageFile {
 public:
  /// Reserves the file's space, all of it, so that no later write finds the disk full. Throws
  /// FileError; nothing stays open or on disk then.
  PageFile(const std::string& directory, std::int64_t bytes);
  PageFile(const PageFile&) = delete;
  PageFile& operator=(const PageFile&) = delete;
  ~PageFile();

  std::byte* data() const { return data_; }  // zeros at first; null if there are no bytes

  /// Whether `drop` frees memory: not on tmpfs, whose files are in memory themselves.
  bool gives_memory_back() const;

  /// Has a range read, and does not wait for it.
  void ask(const ByteRange& range) const;

  /// Waits for what was asked for: the kernel gives nothing back that it still reads.
  void await(const ByteRange& range) const;

  /// Has what was changed in a range written out, and waits for no more of it than the device takes
  /// at a time. Throws FileError.
  void start_writing(const ByteRange& range) const;

  /// Waits until a range is written out, and gives its memory back: the process's, and what the
  /// kernel keeps of the file. Throws FileError, and gives nothing back then.
  void drop(const ByteRange& range) const;

  /// Throws FileError if anything could not be written out since this was said last, also what the
  /// kernel chose to write.
  void check_written() const;

 private:
  [[noreturn]] void fail_to_write(int error) const;

  std::string directory_;
  std::int64_t bytes_;
  OwnedFile file_;
  std::byte* data_ = nullptr;
};

}  // namespace qlora
