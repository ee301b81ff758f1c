// How much work a thread gets at least.
#pragma once

#include <cstdint>

namespace qlora {

// Least work worth a thread of its own, about 16 K elements: below that, waking it costs more.
inline constexpr std::int64_t elements_per_grain = 16384;

/// The items that make a grain, where an item is `elements_per_item` elements of work.
[[gnu::always_inline]] constexpr std::int64_t grain_for(std::int64_t elements_per_item) {
  if (elements_per_item <= 1) return elements_per_grain;
  const std::int64_t items = elements_per_grain / elements_per_item;
  return items > 1 ? items : 1;
}

}  // namespace qlora
