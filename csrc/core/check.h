// Errors of the core. It throws and never prints or exits; the bindings turn each type into a
// Python exception.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>
#include <system_error>

namespace qlora {

/// An argument cannot be right: ValueError in Python.
struct InvalidArgument : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

/// The arguments are right, but this build or device does not do it: NotImplementedError in Python.
struct Unsupported : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// Device memory ran out: torch.OutOfMemoryError in Python, or MemoryError where torch is not loaded.
struct OutOfMemory : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// Host memory ran out: MemoryError in Python, as std::bad_alloc is, which has no room for a reason.
struct HostOutOfMemory : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// A file did not do, or the directory for it: OSError in Python, with `number` as its errno and
/// `path` as its filename.
struct FileError : std::runtime_error {
  FileError(const std::string& text, int error_number, const std::string& error_path)
      : std::runtime_error(text + ": " + std::generic_category().message(error_number)),
        number(error_number),
        path(error_path) {}

  int number;
  std::string path;
};

/// A CUDA call failed: RuntimeError in Python.
struct CudaError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// Streams its arguments into one string.
template <typename... Parts>
std::string message(const Parts&... parts) {
  std::ostringstream stream;
  (stream << ... << parts);
  return stream.str();
}

/// Throws InvalidArgument with the streamed `parts` unless `condition` holds.
template <typename... Parts>
void check(bool condition, const Parts&... parts) {
  if (!condition) throw InvalidArgument(message(parts...));
}

}  // namespace qlora
