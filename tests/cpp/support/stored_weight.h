// NF4 weights that own their bytes, and what those bytes mean in fp64.
#pragma once

#include <vector>

#include "core/operations.h"
#include "support/host_tensor.h"

/// The tensors of a weight [n, k]. They start poisoned: quantise into them, or take a random one.
struct StoredWeight {
  StoredWeight(std::int64_t n, std::int64_t k, std::int64_t block_size, bool is_nested);

  /// Any codes and scales, so that a test of decoding owes nothing to the quantiser.
  static StoredWeight random(std::int64_t n, std::int64_t k, std::int64_t block_size,
                             bool is_nested, Generator& generator);

  qlora::NF4Weight view();
  std::int64_t block_count() const;
  int code(std::int64_t element) const;

  /// absmax of each block: nested, round(round(map[q] * nested_absmax) + offset), both roundings to
  /// fp32.
  std::vector<double> scales() const;
  /// round(round(level * absmax)), to fp32 and then to `format`: the values that the contract
  /// multiplies with.
  reference::Matrix decode(const reference::FloatFormat& format) const;

  std::int64_t n, k, block_size;
  bool is_nested;
  HostTensor codes, absmax, nested_absmax, nested_offset;
};

/// Writes `values` as fp32 into a tensor of bytes.
void store_floats(HostTensor& bytes, const std::vector<double>& values);
std::vector<double> load_floats(const HostTensor& bytes);
