// Whether a build has code for a GPU. Pure C++: tested without one.
#pragma once

#include <charconv>
#include <cstddef>
#include <string_view>
#include <system_error>

namespace qlora::cuda {

/// `architectures` is the build's list, "80-real,90a-real,120". Machine code ("-real") runs on GPUs of
/// its major version, from its minor one on; with the letter "a", on that one alone. PTX, which an
/// entry without "-real" has too, is compiled by the driver for every later GPU, unless the
/// architecture has a letter ("f": its major version). `capability` is 10 * major + minor. What is no number ("native")
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
    const bool is_of_one_gpu = suffix.starts_with('a');
    const bool is_of_a_family = suffix.starts_with('f');
    const bool has_machine_code = !suffix.ends_with("-virtual");
    const bool has_ptx = !suffix.ends_with("-real");
    if (number == capability) return true;
    if (is_of_one_gpu || number > capability) continue;
    if (has_ptx && !is_of_a_family) return true;
    if ((has_machine_code || is_of_a_family) && number / 10 == capability / 10) return true;
  }
  return false;
}

}  // namespace qlora::cuda
