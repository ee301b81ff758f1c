#include "cpu/simd/dynamic_map_tables.h"

namespace qlora::simd {
namespace {

/// That the table of magnitudes serves both signs.
constexpr bool is_odd(const DynamicMap& map) {
  for (std::size_t i = 0; i < dynamic_map_signed_zero_code; ++i) {
    if (map.midpoints[i] != -map.midpoints[2 * dynamic_map_signed_zero_code - 1 - i]) return false;
  }
  return true;
}
static_assert(is_odd(signed_dynamic_map));

}  // namespace

constexpr SignedDynamicMapTable signed_dynamic_map_table = make_signed_dynamic_map_table();
constexpr UnsignedDynamicMapTable unsigned_dynamic_map_table = make_unsigned_dynamic_map_table();

}  // namespace qlora::simd
