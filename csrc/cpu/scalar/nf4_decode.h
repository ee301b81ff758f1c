// Decoding a run of NF4 elements: what the codec and the linear kernels share.
#pragma once

#include <algorithm>
#include <array>

#include "format/float16.h"
#include "format/nf4_layout.h"

namespace qlora::scalar {

/// The 16 values that a block's codes stand for: level * scale in fp32, rounded once to T.
template <typename T>
std::array<T, nf4_level_count> make_decode_table(float scale) {
  std::array<T, nf4_level_count> table;
  for (int code = 0; code < nf4_level_count; ++code) {
    table[static_cast<std::size_t>(code)] = from_float<T>(nf4_level(code) * scale);
  }
  return table;
}

/// Calls `store(i, value)` with the decoded value, as T, of each element begin + i of the flattened
/// weight, for i < count.
template <typename T, typename Store>
void decode_elements(const NF4Bytes& weight, std::int64_t begin, std::int64_t count,
                     Store&& store) {
  const std::int64_t end = begin + count;
  for (std::int64_t e = begin; e < end;) {
    const std::int64_t block = e / weight.block_size;
    const std::int64_t block_end = std::min(end, (block + 1) * weight.block_size);
    const auto table = make_decode_table<T>(weight.scale(block));
    if (e & 1) store(e - begin, table[nf4_code_at(weight.codes, e)]), ++e;
    for (; e + 1 < block_end; e += 2) {
      const std::uint8_t byte = weight.codes[e >> 1];
      store(e - begin, table[byte >> 4]);
      store(e - begin + 1, table[byte & 0x0f]);
    }
    if (e < block_end) store(e - begin, table[nf4_code_at(weight.codes, e)]), ++e;
  }
}

/// decode_elements into fp32 copies of values that have been rounded to T.
template <typename T>
void decode_to_float(const NF4Bytes& weight, std::int64_t begin, std::int64_t count, float* out) {
  decode_elements<T>(weight, begin, count,
                     [out](std::int64_t i, T value) { out[i] = to_float(value); });
}

}  // namespace qlora::scalar
