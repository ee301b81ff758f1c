#include "cpu/openmp_runtime.h"

#if defined(__linux__)
#include <dlfcn.h>

#include <string>

#include <link.h>

namespace qlora {
namespace {

/// dl_iterate_phdr's callback: remembers the path of an OpenMP runtime, torch's own before any
/// other.
int find_runtime(dl_phdr_info* library, std::size_t, void* found) {
  const std::string path = library->dlpi_name;
  const std::string name = path.substr(path.rfind('/') + 1);
  const auto starts_with = [&](const char* prefix) { return name.rfind(prefix, 0) == 0; };
  if (!starts_with("libgomp") && !starts_with("libiomp5") && !starts_with("libomp")) return 0;
  const bool is_torchs = path.find("/torch/lib/") != std::string::npos ||
                         path.find("/torch.libs/") != std::string::npos;
  auto& first = *static_cast<std::string*>(found);
  if (first.empty() || is_torchs) first = path;
  return is_torchs;  // not 0: stop looking
}

OpenMPParallel look_up() {
  std::string path;
  dl_iterate_phdr(find_runtime, &path);
  if (path.empty()) return nullptr;
  void* const runtime = dlopen(path.c_str(), RTLD_NOLOAD | RTLD_LAZY);  // never closed
  if (runtime == nullptr) return nullptr;
  return reinterpret_cast<OpenMPParallel>(dlsym(runtime, "GOMP_parallel"));
}

}  // namespace

OpenMPParallel openmp_parallel() {
  static const OpenMPParallel found = look_up();
  return found;
}

}  // namespace qlora

#else

namespace qlora {

OpenMPParallel openmp_parallel() { return nullptr; }

}  // namespace qlora

#endif
