// Whether a build has code for a GPU. Pure C++: tested without one.
#pragma once

#include <charconv>
#include <string_view>

namespace qlora::cuda {

/// `architectures` is the build's list, "80-real,90a-real,120". Machine code ("-real") runs on GPUs of
/// its major version, from its minor one on; an architecture with a letter, on that one alone. PTX,
/// which an entry without "-real" has too, is compiled by the driver for every later GPU, unless of
/// an architecture with a letter. `capability` is 10 * major + minor. What is no number ("native")
/// counts as code for all.
inline bool has_code_for(std::string_view architectures, int capability) {
  while (!architectures.empty()) {
    const std::string_view entry = architectures.substr(0, architectures.find(','));
    architectures.remove_prefix(entry.size() < architectures.size() ? entry.size() + 1
                                                                    : entry.size());
    int number = 0;
    const auto [rest, error] = std::from_chars(entry.data(), entry.data() + entry.size(), number);
    if (error != std::errc{}) return true;
    const std::string_view suffix = entry.substr(static_cast<std::size_t>(rest - entry.data()));
    const bool has_letter = !suffix.empty() && suffix.front() != '-';
    const bool has_machine_code = !suffix.ends_with("-virtual");
    const bool has_ptx = !suffix.ends_with("-real");
    if (number == capability) return true;
    if (has_letter || number > capability) continue;
    if (has_ptx || (has_machine_code && number / 10 == capability / 10)) return true;
  }
  return false;
}

}  // namespace qlora::cuda
