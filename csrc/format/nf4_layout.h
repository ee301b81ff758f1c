// Where the bytes of an NF4 weight are: nibbles, blocks, scales and nested scales. They are
// bitsandbytes' bytes.
//
// A weight [n, k] is flattened row-major and cut into blocks of `block_size` elements; a block may
// straddle rows and the last one may be short. Element e is a nibble:
//
//   byte      0         1         2      ...
//           +----+----+----+----+----+----+
//   codes   | e0 | e1 | e2 | e3 | e4 | e5 |  ...     even element: high nibble, odd one: low nibble
//           +----+----+----+----+----+----+          an odd count is padded with the code of zero
//
//   plain scales       absmax         fp32 a block
//   nested scales      absmax         1 byte a block: q, a code of the signed dynamic map
//                      nested_absmax  fp32 for 256 blocks
//                      nested_offset  fp32 for the weight: the mean of all absmax
//
//   absmax[b] = map[q[b]] * nested_absmax[b / 256] + nested_offset          the product is rounded
//   before the sum
//
// Bytes a weight at block 64: 1/2 + 1/64 + 4/(64 * 256) = 0.5159 (4.127 bits) nested, 0.5625 (4.5
// bits) plain.
#pragma once

#include <cstdint>
#include <cstring>

#include "format/dynamic_map.h"
#include "format/host_device.h"
#include "format/nf4.h"

namespace qlora {

inline constexpr std::int64_t nf4_min_block_size = 32;
inline constexpr std::int64_t nf4_max_block_size = 4096;
inline constexpr std::int64_t nf4_blocks_per_nested_block = 256;

/// A power of two from 32 to 4096: a block then always starts on a whole byte.
QLORA_HOST_DEVICE constexpr bool is_nf4_block_size(std::int64_t block_size) {
  return block_size >= nf4_min_block_size && block_size <= nf4_max_block_size &&
         (block_size & (block_size - 1)) == 0;
}

QLORA_HOST_DEVICE constexpr std::int64_t ceil_divide(std::int64_t a, std::int64_t b) {
  return (a + b - 1) / b;
}

QLORA_HOST_DEVICE constexpr std::int64_t nf4_code_bytes(std::int64_t element_count) {
  return ceil_divide(element_count, 2);
}

QLORA_HOST_DEVICE constexpr std::int64_t nf4_block_count(std::int64_t element_count,
                                                         std::int64_t block_size) {
  return ceil_divide(element_count, block_size);
}

QLORA_HOST_DEVICE constexpr std::int64_t nf4_nested_block_count(std::int64_t block_count) {
  return ceil_divide(block_count, nf4_blocks_per_nested_block);
}

QLORA_HOST_DEVICE constexpr std::uint8_t nf4_pack(int even, int odd) {
  return static_cast<std::uint8_t>(even << 4 | odd);
}

/// The code of element `e` of the flattened weight.
QLORA_HOST_DEVICE constexpr int nf4_code_at(const std::uint8_t* codes, std::int64_t e) {
  const std::uint8_t byte = codes[e >> 1];
  return (e & 1) ? byte & 0x0f : byte >> 4;
}

/// Reads the fp32 at index `i` of bytes that need not be aligned.
inline float load_float(const std::uint8_t* bytes, std::int64_t i) {
  float value;
  std::memcpy(&value, bytes + 4 * i, sizeof value);
  return value;
}

inline void store_float(std::uint8_t* bytes, std::int64_t i, float value) {
  std::memcpy(bytes + 4 * i, &value, sizeof value);
}

/// The stored bytes of one NF4 weight, in host memory.
struct NF4Bytes {
  std::uint8_t* codes;
  std::uint8_t* absmax;
  std::uint8_t* nested_absmax;  // null: plain scales
  std::uint8_t* nested_offset;  // null: plain scales
  std::int64_t n, k, block_size;

  std::int64_t element_count() const { return n * k; }
  std::int64_t block_count() const { return nf4_block_count(element_count(), block_size); }
  // Not by nested_absmax, which is empty, and may be null, where there are no blocks.
  bool is_nested() const { return nested_offset != nullptr; }

  /// absmax of block `b` in fp32.
  float scale(std::int64_t b) const {
    if (!is_nested()) return load_float(absmax, b);
    const float product = signed_dynamic_map.decode(absmax[b]) *
                          load_float(nested_absmax, b / nf4_blocks_per_nested_block);
    return product + load_float(nested_offset, 0);
  }
};

}  // namespace qlora
